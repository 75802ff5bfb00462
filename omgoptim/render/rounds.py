"""The facts of rounds, training and sensitivity in the words in which every renderer tells them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omgoptim.render import facts
from omgoptim.reports import EfficiencyReport, Epoch, Round, SensitivityPoint, Training

KEPT = "✓"
_BARS = "▁▂▃▄▅▆▇█"
_EPS = 1e-12


@dataclass(frozen=True, slots=True)
class Slack:
    """How quality falls when only one layer or group is compressed."""

    path: str
    points: tuple[SensitivityPoint, ...]
    """By amount, the smallest first."""
    within: float | None
    """The largest amount up to which every drop is within the guard; None where the guard is not known."""

    @property
    def worst(self) -> SensitivityPoint:
        """The point that loses most."""
        return max(self.points, key=lambda point: (point.quality_drop, point.amount))


def amount_text(amount: float | None) -> str:
    """`90%`; empty where no amount is the goal."""
    return "" if amount is None else f"{100 * amount:.3g}%"


def quality_text(quality: float | None) -> str:
    return "" if quality is None else f"{quality:.4f}"


def shown_rounds(report: EfficiencyReport, most: int | None = None) -> list[Round]:
    """The rounds, in order; of many, the last ones and the one that was kept.

    One that has neither a goal nor a result is left out: the plan of a distillation, whose size the summary tells.
    """
    rounds = [
        one for one in report.rounds if one.amount is not None or one.why or one.speedup is not None or _judged(one)
    ]
    if most is None or len(rounds) <= most:
        return list(rounds)
    last = rounds[-most:]
    kept = [one for one in rounds[:-most] if one.kept]
    return [*kept[-1:], *(last[1:] if kept else last)]


def round_columns(rounds: Sequence[Round]) -> dict[str, list[str]]:
    """The table of rounds by column, a text for each round; a column that nothing is known of is left out."""
    columns = {
        "round": [str(one.number) for one in rounds],
        "amount": [amount_text(one.amount) for one in rounds],
        "taken": [quality_text(one.quality_taken) for one in rounds],
        "re-estimated": [quality_text(one.quality_reestimated) for one in rounds],
        "trained": [quality_text(one.quality_trained) for one in rounds],
        "drop": [quality_text(one.quality_drop) for one in rounds],
        "speedup": ["" if one.speedup is None else facts.ratio_text(one.speedup) for one in rounds],
        "left": [_left_text(one) for one in rounds],
        "kept": [KEPT if one.kept else "" for one in rounds],
    }
    return {name: cells for name, cells in columns.items() if any(cells)}


def rounds_note(rounds: Sequence[Round]) -> str:
    """What the columns of qualities are; empty where there are none."""
    if not any(_judged(one) for one in rounds):
        return ""
    reestimated = ", after batch-norm statistics were estimated again" * any(r.quality_reestimated for r in rounds)
    trained = ", after training" * any(one.quality_trained is not None for one in rounds)
    return f"quality on the selection samples: right after weights were taken away{reestimated}{trained}"


def _judged(one: Round) -> bool:
    """Whether a quality is known of it."""
    qualities = (one.quality_taken, one.quality_reestimated, one.quality_trained)
    return any(quality is not None for quality in qualities)


def training_text(training: Training) -> str:
    """What was trained and how it went, in one line."""
    epochs = training.epochs
    if not epochs:
        return f"no epoch ended; {training.stopped}" if training.stopped else "no epoch"
    rounds = len({epoch.round for epoch in epochs})
    last = [epoch.loss for epoch in epochs if epoch.round == epochs[-1].round]
    of_last = f" in round {epochs[-1].round}" if rounds > 1 else ""
    parts = [
        _count(len(epochs), "epoch") + (f" in {rounds} rounds" if rounds > 1 else ""),
        f"{training.optimizer}, {training.loss}",
        f"loss{of_last} {' -> '.join(_loss_text(loss) for loss in dict.fromkeys((last[0], last[-1])))}",
    ]
    kept = kept_epoch(epochs)
    if kept is not None:
        of_round = f" of round {kept.round}" if rounds > 1 else ""
        parts.append(f"kept epoch {kept.epoch}{of_round}" + (f" ({_quality(kept, training)})" if kept.quality else ""))
    parts += [facts.wait_text(training.seconds), _trained_text(training)]
    if training.teacher_outputs:
        parts.append(f"the teacher's outputs {training.teacher_outputs}")
    if training.resumed:
        parts.append("resumed once" if training.resumed == 1 else f"resumed {training.resumed} times")
    if training.stopped:
        parts.append(f"stopped early: {training.stopped}")
    return "; ".join(parts)


def kept_epoch(epochs: Sequence[Epoch]) -> Epoch | None:
    """The last epoch whose weights were kept."""
    return next((epoch for epoch in reversed(epochs) if epoch.best), None)


def slacks(report: EfficiencyReport) -> list[Slack]:
    """The layers or groups by how much quality they cost, the most sensitive first."""
    points: dict[str, list[SensitivityPoint]] = {}
    for point in report.sensitivity:
        points.setdefault(point.path, []).append(point)
    guard = report.request.get("max_quality_drop")
    guard = float(guard) if isinstance(guard, (int, float)) else None
    found = []
    for path, of_path in points.items():
        ordered = tuple(sorted(of_path, key=lambda point: point.amount))
        found.append(Slack(path, ordered, None if guard is None else _within(ordered, guard)))
    return sorted(found, key=lambda slack: (-slack.worst.quality_drop, -_mean_drop(slack)))


def extremes(found: Sequence[Slack], each: int = 5) -> list[Slack]:
    """The most sensitive and the least, in order."""
    return list(found) if len(found) <= 2 * each else [*found[:each], *found[-each:]]


def spark(slack: Slack, highest: float) -> str:
    """The drops of one layer as a row of bars; `highest` is the drop of a full bar."""
    top = max(highest, _EPS)
    steps = [max(0.0, min(1.0, point.quality_drop / top)) for point in slack.points]
    return "".join(_BARS[round(step * (len(_BARS) - 1))] for step in steps)


def highest_drop(found: Sequence[Slack]) -> float:
    return max((slack.worst.quality_drop for slack in found), default=0.0)


def amounts_text(slack: Slack) -> str:
    """`50%, 75%, 90%`: what the bars stand for."""
    return ", ".join(amount_text(point.amount) for point in slack.points)


def within_text(slack: Slack) -> str:
    """`75%`: how much may be taken from this layer alone; `nothing` where the smallest amount is too much."""
    return "" if slack.within is None else amount_text(slack.within) if slack.within else "nothing"


def _within(points: Sequence[SensitivityPoint], guard: float) -> float:
    amount = 0.0
    for point in points:
        if point.quality_drop > guard + _EPS:
            break
        amount = point.amount
    return amount


def _mean_drop(slack: Slack) -> float:
    return sum(point.quality_drop for point in slack.points) / len(slack.points)


def _left_text(one: Round) -> str:
    """Parameters that are left: those that are no zero, where some are."""
    left = one.params if one.nonzero_params is None else one.nonzero_params
    return "" if left is None else facts.count_text(left)


def _trained_text(training: Training) -> str:
    total = facts.count_text(training.total_params)
    if training.trained_params >= training.total_params:
        return f"all {total} parameters"
    return f"{facts.count_text(training.trained_params)} of {total} parameters"


def _quality(epoch: Epoch, training: Training) -> str:
    return f"{training.metric} {quality_text(epoch.quality)}" if training.metric else quality_text(epoch.quality)


def _loss_text(loss: float | None) -> str:
    return f"{loss:.3g}" if loss is not None and math.isfinite(loss) else "no number"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
