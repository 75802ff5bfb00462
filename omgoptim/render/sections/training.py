"""Rounds of pruning or factorization, training, and the control of a distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omgoptim.render.blocks import Block, Columns, Items, Line, Mark, Section, Table, Text, cells_of, charts
from omgoptim.render.charts import learning_curve
from omgoptim.render.claims import control_claim
from omgoptim.render.numbers import (
    amount_text,
    bars,
    count_text,
    if_known,
    plain,
    quality_text,
    ratio_text,
    wait_text,
)
from omgoptim.reports import Control, EfficiencyReport, Epoch, Round, Training
from omgoptim.text import plural

BRIEF_ROUNDS = 8
"""Rounds that the short form shows. Chosen: what fits a screen."""

KEPT = "✓"
DISTILLED, CONTROL = "with the teacher", "without the teacher"
MAX_BARS = 40
"""Epochs that a curve of text has at most. Chosen: half of a line."""


def rounds_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Table of the rounds: target amount, and quality at each step."""
    shown = shown_rounds(report, None if full else BRIEF_ROUNDS)
    if not shown:
        return None
    numbers = round_columns(shown)
    columns: Columns = {**numbers, "why": [Text(one.why, limit=400 if full else 160) for one in shown]}
    numeric = [name for name in numbers if name != "kept"]
    left_out = len(shown_rounds(report)) - len(shown)
    marks: list[Mark] = ["chosen" if one.kept else "" for one in shown]
    table = Table(
        *cells_of(columns, numeric=numeric, marks=marks), title="rounds", left_out=left_out, note=rounds_note(shown)
    )
    return Section("Rounds", (table,))


def training_section(report: EfficiencyReport, _full: bool) -> Section | None:
    """Training record; for a distillation also the control and both curves."""
    if report.training is None:
        return None
    text = training_text(report.training)
    blocks: list[Block] = [Line("training", Text(text, limit=600))]
    if report.control is not None:
        blocks.append(Line("control", Text(control_text(report.control), limit=600)))
    curves = curve_lines(report)
    if curves:
        blocks.append(Items("quality by epoch, on the selection samples", tuple(Text(line) for line in curves)))
    control = report.control.training.epochs if report.control and report.control.training else []
    note = "the two qualities can be compared, the losses cannot" if report.control is not None else ""
    picture = learning_curve(report.training.epochs, control, plain(text, 600), (DISTILLED, CONTROL))
    return Section("Training", (*blocks, *charts(picture)), note)


def shown_rounds(report: EfficiencyReport, most: int | None = None) -> list[Round]:
    """Return the rounds, in order; of many, the last ones and the one that was kept.

    One that has neither a goal nor a result is left out: the plan of a distillation, whose size is in the summary.
    """
    rounds = [
        one
        for one in report.rounds
        if one.amount is not None or one.why or one.speedup is not None or _has_quality(one)
    ]
    if most is None or len(rounds) <= most:
        return list(rounds)
    last = rounds[-most:]
    kept = [one for one in rounds[:-most] if one.kept]
    return [*kept[-1:], *(last[1:] if kept else last)]


def round_columns(rounds: Sequence[Round]) -> dict[str, list[str]]:
    """Return the table of rounds by column, a text for each round; a column without any value is left out."""
    columns = {
        "round": [str(one.number) for one in rounds],
        "amount": [amount_text(one.amount) for one in rounds],
        "compressed": [quality_text(one.quality_taken) for one in rounds],
        "re-estimated": [quality_text(one.quality_reestimated) for one in rounds],
        "trained": [quality_text(one.quality_trained) for one in rounds],
        "drop": [quality_text(one.quality_drop) for one in rounds],
        "speedup": [if_known(ratio_text, one.speedup) for one in rounds],
        "parameters": [_left_text(one) for one in rounds],
        "kept": [KEPT if one.kept else "" for one in rounds],
    }
    return {name: cells for name, cells in columns.items() if any(cells)}


def rounds_note(rounds: Sequence[Round]) -> str:
    """Return the legend of the quality columns; empty without them."""
    if not any(_has_quality(one) for one in rounds):
        return ""
    reestimated = ", after batch-norm statistics were estimated again" * any(r.quality_reestimated for r in rounds)
    trained = ", after training" * any(one.quality_trained is not None for one in rounds)
    return f"quality on the selection samples: right after pruning or factorization{reestimated}{trained}"


def _has_quality(one: Round) -> bool:
    """Return True if a quality of the round is known."""
    qualities = (one.quality_taken, one.quality_reestimated, one.quality_trained)
    return any(quality is not None for quality in qualities)


def _left_text(one: Round) -> str:
    """Return the remaining parameters; the non-zero ones if some are zero."""
    left = one.params if one.nonzero_params is None else one.nonzero_params
    return if_known(count_text, left)


def training_text(training: Training) -> str:
    """Return the training record as one line."""
    epochs = training.epochs
    if not epochs:
        return f"no epoch ended; {training.stopped}" if training.stopped else "no epoch"
    rounds = len({epoch.round for epoch in epochs})
    last = [epoch.loss for epoch in epochs if epoch.round == epochs[-1].round]
    of_last = f" in round {epochs[-1].round}" if rounds > 1 else ""
    parts = [
        plural(len(epochs), "epoch") + (f" in {rounds} rounds" if rounds > 1 else ""),
        f"{training.optimizer}, {training.loss}",
        f"loss{of_last} {' -> '.join(_loss_text(loss) for loss in dict.fromkeys((last[0], last[-1])))}",
    ]
    kept = kept_epoch(epochs)
    if kept is not None:
        of_round = f" of round {kept.round}" if rounds > 1 else ""
        parts.append(f"kept epoch {kept.epoch}{of_round}" + (f" ({_quality(kept, training)})" if kept.quality else ""))
    parts += [wait_text(training.seconds), _trained_text(training)]
    if training.teacher_outputs:
        parts.append(f"the teacher's outputs {training.teacher_outputs}")
    if training.resumed:
        parts.append("resumed once" if training.resumed == 1 else f"resumed {training.resumed} times")
    if training.stopped:
        parts.append(f"stopped early: {training.stopped}")
    return "; ".join(parts)


def kept_epoch(epochs: Sequence[Epoch]) -> Epoch | None:
    """Return the last epoch whose weights were kept."""
    return next((epoch for epoch in reversed(epochs) if epoch.best), None)


@dataclass(frozen=True, slots=True)
class StudentTraining:
    """One training of the student: with the teacher, or the control without it."""

    name: str
    training: Training

    @property
    def qualities(self) -> list[float]:
        """Quality on the selection samples by epoch; epochs without a number are left out."""
        known = (epoch.quality for epoch in self.training.epochs)
        return [quality for quality in known if quality is not None and math.isfinite(quality)]


def student_trainings(report: EfficiencyReport) -> list[StudentTraining]:
    """Return the trainings of a distillation, that with the teacher first; empty for any other report."""
    if report.verb != "distill":
        return []
    control = report.control.training if report.control else None
    each = ((DISTILLED, report.training), (CONTROL, control))
    return [StudentTraining(name, training) for name, training in each if training is not None]


def control_text(control: Control, trained: bool = True) -> str:
    """Return one line on the control: its quality, the effect of distillation, and which of the two is the artifact.

    With `trained`, its training too.
    """
    alone = "the same student, trained as long without the teacher"
    parts = [alone if control.quality is None else f"{alone}, reaches {control.quality:.4f}"]
    claim, _ = control_claim(control)
    parts += [claim] if claim else []
    if control.kept:
        parts.append("this one is the artifact: it was better on the selection samples than the distilled one")
    else:
        parts.append("the distilled one is the artifact: it was not worse on the selection samples")
    if trained and control.training is not None:
        parts.append(training_text(control.training))
    return "; ".join(parts)


def curve_lines(report: EfficiencyReport) -> list[str]:
    """Return the quality of each epoch as a bar, all trainings on one scale; empty below two epochs.

    `▂▅▇█ 0.8113 -> 0.9667 with the teacher, best in the last epoch`
    """
    shown = [one for one in student_trainings(report) if len(one.qualities) > 1]
    every = [quality for one in shown for quality in one.qualities]
    lines = []
    for one in shown:
        ends = " -> ".join(quality_text(quality) for quality in (one.qualities[0], one.qualities[-1]))
        rising = ", best in the last epoch" if is_last_epoch_best(one.training) else ""
        lines.append(f"{_bars(one.qualities, min(every), max(every))} {ends} {one.name}{rising}")
    return lines


def is_last_epoch_best(training: Training) -> bool:
    """Return True if the last epoch is better than all earlier ones."""
    epochs = training.epochs
    earlier = [epoch.quality for epoch in epochs[:-1] if epoch.quality is not None]
    last = epochs[-1].quality if epochs else None
    return bool(earlier) and last is not None and last > max(earlier)


def _trained_text(training: Training) -> str:
    total = count_text(training.total_params)
    if training.trained_params >= training.total_params:
        return f"all {total} parameters"
    return f"{count_text(training.trained_params)} of {total} parameters"


def _quality(epoch: Epoch, training: Training) -> str:
    return f"{training.metric} {quality_text(epoch.quality)}" if training.metric else quality_text(epoch.quality)


def _loss_text(loss: float | None) -> str:
    return f"{loss:.3g}" if loss is not None and math.isfinite(loss) else "no number"


def _bars(qualities: list[float], low: float, high: float) -> str:
    """Return one bar per epoch; of many epochs, evenly spaced ones with the last."""
    count = min(len(qualities), MAX_BARS)
    shown = [qualities[round(place * (len(qualities) - 1) / (count - 1))] for place in range(count)]
    span = high - low
    return bars([(quality - low) / span if span > 0 else 1.0 for quality in shown])
