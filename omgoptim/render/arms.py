"""The two trainings of a distillation, with the teacher and without it, in the words that every renderer uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omgoptim.render import facts, rounds
from omgoptim.reports import Control, EfficiencyReport, Training

DISTILLED, CONTROL = "with the teacher", "without the teacher"
_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 40


@dataclass(frozen=True, slots=True)
class Arm:
    """One training of the student."""

    name: str
    training: Training

    @property
    def qualities(self) -> list[float]:
        """On the selection samples, by epoch; epochs without a number are left out."""
        known = (epoch.quality for epoch in self.training.epochs)
        return [quality for quality in known if quality is not None and math.isfinite(quality)]


def arms(report: EfficiencyReport) -> list[Arm]:
    """The trainings of a distillation, that with the teacher first; empty for any other report."""
    if report.verb != "distill":
        return []
    control = report.control.training if report.control else None
    each = ((DISTILLED, report.training), (CONTROL, control))
    return [Arm(name, training) for name, training in each if training is not None]


def control_text(control: Control, trained: bool = True) -> str:
    """What the student reaches alone, what the teacher brought, and which of the two is the artifact, in one line.

    Args:
        trained: whether to tell how its training went, too.
    """
    alone = "the same student, trained as long without the teacher"
    parts = [alone if control.quality is None else f"{alone}, reaches {control.quality:.4f}"]
    claim, _ = facts.control_claim(control)
    parts += [claim] if claim else []
    if control.kept:
        parts.append("this one is the artifact: it was better on the selection samples than the distilled one")
    else:
        parts.append("the distilled one is the artifact: it was no worse on the selection samples")
    if trained and control.training is not None:
        parts.append(rounds.training_text(control.training))
    return "; ".join(parts)


def curve_lines(report: EfficiencyReport) -> list[str]:
    """The quality of each epoch as a bar, all trainings on one scale; empty below two epochs.

    `▂▅▇█ 0.8113 -> 0.9667 with the teacher, best in the last epoch`
    """
    shown = [arm for arm in arms(report) if len(arm.qualities) > 1]
    every = [quality for arm in shown for quality in arm.qualities]
    lines = []
    for arm in shown:
        ends = " -> ".join(rounds.quality_text(quality) for quality in (arm.qualities[0], arm.qualities[-1]))
        rising = ", best in the last epoch" if best_at_the_end(arm.training) else ""
        lines.append(f"{_bars(arm.qualities, min(every), max(every))} {ends} {arm.name}{rising}")
    return lines


def best_at_the_end(training: Training) -> bool:
    """Whether the last of several epochs was better than every one before it."""
    epochs = training.epochs
    earlier = [epoch.quality for epoch in epochs[:-1] if epoch.quality is not None]
    last = epochs[-1].quality if epochs else None
    return bool(earlier) and last is not None and last > max(earlier)


def _bars(qualities: list[float], low: float, high: float) -> str:
    """One bar an epoch; of many epochs evenly spread ones, the last among them."""
    count = min(len(qualities), _MOST_BARS)
    shown = [qualities[round(place * (len(qualities) - 1) / (count - 1))] for place in range(count)]
    span = high - low
    steps = [(quality - low) / span if span > 0 else 1.0 for quality in shown]
    return "".join(_BARS[round(step * (len(_BARS) - 1))] for step in steps)
