"""Choose the width of every group: lose the least importance within a latency budget.

A multiple-choice knapsack as in HALP (arXiv:2110.10811): every group takes one of its widths, the layers' measured
times may add up to no more than wanted, and what is lost of the importance is to be the least. Two things differ:

- Importance is compared between groups by the share that a width keeps of its group's own: scores of different layers
  have no common scale. What is lost is the square of the share's logarithm. The logarithm, because a network passes on
  a product of shares, group after group; its square, because harm grows faster than what is removed, so that equally
  costly groups shrink alike. Sums of plain shares or of plain logarithms would empty the costliest groups first.
- A layer's time depends on two groups, the one it reads and the one it writes, so times do not add up group by group.
  Widths are first optimized group by group for a price per millisecond (Lagrangian relaxation). Then times are
  linearized around the best widths, the knapsack is solved exactly for them, and the result is kept if the measured
  times agree. Last, a local search changes one or two groups at a time. Where times do add up, the result is the
  optimum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from omgoptim.techniques.prune._latency.latency_table import (
    TimeTable,
    allowed_widths,
    full_ms,
    step_edges,
    unreachable_target,
)

MAX_STATES = 20_000
"""Maximum states of the exact knapsack; beyond, the best of each of as many time steps stays. Chosen by memory."""

LOSS_TOLERANCE = 1e-12
"""Tolerance of comparisons of float64 sums of losses."""

Choice = tuple[int, ...]
"""For each group, the index of an option."""

PRICE_STEPS = 40
"""Bisection steps of the Lagrange multiplier (loss per millisecond): a range of 1e6 shrinks to a relative 1e-11."""

MAX_LINEARIZATIONS = 8
"""Maximum rounds of linearization around the best widths. Chosen: a safeguard; they end once nothing improves."""

MAX_PAIRS = 200_000
"""Maximum pairwise changes of one local search sweep; with more, only neighbouring widths are tried. Chosen by time."""


def multiple_choice(
    times: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float
) -> Choice | None:
    """Return one option per group with the least total loss within the budget; None if there is none.

    Exact (states that another beats in both time and loss are dropped) up to `MAX_STATES` states; times may be
    negative: they are differences to a point.

    Args:
        times: per group and option.
        losses: per group and option.
        budget: in the unit of `times`.
    """
    least_left = [0.0]
    for group_times in reversed(times):
        least_left.append(least_left[-1] + min(group_times))
    states: list[tuple[float, float, Choice]] = [(0.0, 0.0, ())]
    for g, (group_times, group_losses) in enumerate(zip(times, losses, strict=True)):
        room = budget - least_left[len(times) - g - 1] + 1e-9 * max(abs(budget), LOSS_TOLERANCE)
        grown = (
            (spent + ms, loss + group_losses[option], (*chosen, option))
            for spent, loss, chosen in states
            for option, ms in enumerate(group_times)
            if spent + ms <= room
        )
        states = _undominated(sorted(grown))
        if not states:
            return None
    return min(states, key=lambda state: (state[1], state[0]))[2]


def _undominated(states: Sequence[tuple[float, float, Choice]]) -> list[tuple[float, float, Choice]]:
    """Return, of states sorted by time, those that lose less than every faster one; thinned to `MAX_STATES`."""
    kept: list[tuple[float, float, Choice]] = []
    for state in states:
        if not kept or state[1] < kept[-1][1] - LOSS_TOLERANCE:
            kept.append(state)
    if len(kept) <= MAX_STATES:
        return kept
    step = (kept[-1][0] - kept[0][0]) / MAX_STATES
    bins = {int((state[0] - kept[0][0]) / step): state for state in kept}  # the last of a bin loses least
    return [kept[0], *(state for state in bins.values() if state is not kept[0])]


def choose_widths(
    table: TimeTable, importance: Mapping[str, Tensor], fraction: float, max_layer_ratio: float = 0.9
) -> dict[str, int]:
    """Return the widths that lose the least importance while the layers take at most `fraction` of their time.

    Args:
        table: measured times.
        importance: group to one score per channel (or per unit), additive, not negative: squared norms, Taylor terms.
            A group that is not in it keeps its full width.
        fraction: fraction of the layers' time to keep, 0..1.
        max_layer_ratio: most of one group that may be removed, 0..1.

    Returns:
        Group to kept width, for every group of the table. Which channels stay is for the caller: the most important.

    Raises:
        TechniqueError: even the narrowest widths allowed take longer.
    """
    budget = fraction * full_ms(table)
    problem = width_problem(table, importance, max_layer_ratio)
    fastest = _fastest(problem)
    if problem.ms(fastest) > budget:
        raise unreachable_target(
            f"with at most {max_layer_ratio:.0%} of each group removed (max_layer_ratio), the prunable layers still "
            f"take {problem.ms(fastest) / full_ms(table):.0%} of their latency; the target needs {fraction:.0%}",
            f"their largest speedup is {full_ms(table) / problem.ms(fastest):.2f}x",
        )
    return problem.widths(solve(problem, budget, fastest))


def fastest_widths(table: TimeTable, importance: Mapping[str, Tensor], max_layer_ratio: float = 0.9) -> dict[str, int]:
    """Return the fastest widths that `choose_widths` can reach, from the same arguments."""
    problem = width_problem(table, importance, max_layer_ratio)
    return problem.widths(_fastest(problem))


def kept_share(importance: Tensor, width: int, full: int) -> float:
    """Return the share, 0..1, of a group's importance in its `width` most important channels.

    Args:
        importance: (channels,) or (units,): one score for every so many channels of `full`.
        width: channels kept.
        full: channels of the group.
    """
    scores = importance.detach().double().clamp_min(0).sort(descending=True).values
    kept = round(width * len(scores) / full)
    total = float(scores.sum())
    return float(scores[:kept].sum()) / total if total > 0 else kept / len(scores)


@dataclass(slots=True)
class WidthProblem:
    """A multiple-choice knapsack whose times depend on several groups each."""

    names: Sequence[str]
    options: Sequence[tuple[int, ...]]
    """For each group its widths, ascending."""
    losses: Sequence[tuple[float, ...]]
    """For each group and width, what is lost: the squared logarithm of the share kept; falls as the width grows."""
    table: TimeTable
    touching: list[list[int]] = field(default_factory=list)
    """For each group, the layers whose time depends on it."""
    readers: list[tuple[int, ...]] = field(default_factory=list)
    """For each layer, the groups (indices) it depends on."""
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index = {name: g for g, name in enumerate(self.names)}
        self.readers = [tuple(index[name] for name in layer.groups if name in index) for layer in self.table.layers]
        self.touching = [[i for i, groups in enumerate(self.readers) if g in groups] for g in range(len(self.names))]

    def layer_ms(self, layer: int, choice: Choice) -> float:
        groups = self.readers[layer]
        key = (layer, *(choice[g] for g in groups))
        if key not in self.known:
            widths = {self.names[g]: self.options[g][choice[g]] for g in groups}
            self.known[key] = self.table.layers[layer].at({**self.table.widths, **widths})
        return self.known[key]

    def widths(self, choice: Choice) -> dict[str, int]:
        """Return the width of every group of the table; groups without choices keep their full one."""
        return {**self.table.widths, **{name: self.options[g][choice[g]] for g, name in enumerate(self.names)}}

    def ms(self, choice: Choice) -> float:
        return sum(self.layer_ms(layer, choice) for layer in range(len(self.readers)))

    def loss(self, choice: Choice) -> float:
        return sum(losses[option] for losses, option in zip(self.losses, choice, strict=True))

    def change_ms(self, choice: Choice, changed: Choice, groups: Sequence[int]) -> float:
        """Return how much longer `changed` takes than `choice`, which differ in `groups` only."""
        layers = {layer for g in groups for layer in self.touching[g]}
        return sum(self.layer_ms(layer, changed) - self.layer_ms(layer, choice) for layer in layers)


def width_problem(table: TimeTable, importance: Mapping[str, Tensor], max_layer_ratio: float) -> WidthProblem:
    """Return the groups with a choice, their widths at the edges of latency steps, and the losses."""
    names = [name for name in table.widths if name in importance]
    options, losses = [], []
    for name in names:
        full = table.widths[name]
        widths = _edges(table, name, allowed_widths(table, name, max_layer_ratio))
        shares = [kept_share(importance[name], width, full) for width in widths]
        options.append(widths)
        losses.append(tuple(math.log(max(share, LOSS_TOLERANCE)) ** 2 for share in shares))
    return WidthProblem(names, options, losses, table)


def solve(problem: WidthProblem, budget: float, start: Choice) -> Choice:
    """Return the best choice found that takes at most `budget` ms; `start` must."""
    best = min((start, *_by_price(problem, budget)), key=problem.loss)
    for _ in range(MAX_LINEARIZATIONS):
        better = _linearized(problem, budget, best)
        if better is None or problem.loss(better) >= problem.loss(best) - LOSS_TOLERANCE:
            break
        best = better
    return _local_search(problem, budget, best)


def _edges(table: TimeTable, name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widths at the edges of the latency steps of a group's layers, the others at full or least width."""
    layers = [layer for layer in table.layers if name in layer.groups]
    if not layers:
        return widths[-1:]  # nothing was measured that it could make faster
    edges: set[int] = set()
    for others in (dict(table.widths), {other: options[0] for other, options in table.candidates.items()}):
        times = {width: sum(layer.at({**others, name: width}) for layer in layers) for width in widths}
        edges |= set(step_edges(times, widths))
    return tuple(sorted(edges))


def _fastest(problem: WidthProblem) -> Choice:
    """Return the choice with the least time, group by group from the narrowest."""
    return _coordinate_descent(problem, tuple(0 for _ in problem.names), math.inf)


def _coordinate_descent(problem: WidthProblem, choice: Choice, price: float) -> Choice:
    """Descend by coordinates to the least `loss + price * time`; an infinite price minimizes time alone."""
    for _ in range(50):
        before = choice
        for g, losses in enumerate(problem.losses):
            costs = []
            for option, loss in enumerate(losses):
                ms = sum(problem.layer_ms(layer, _replaced(choice, {g: option})) for layer in problem.touching[g])
                costs.append((ms, loss) if math.isinf(price) else (loss + price * ms, loss))
            choice = _replaced(choice, {g: min(range(len(costs)), key=costs.__getitem__)})
        if choice == before:
            break
    return choice


def _by_price(problem: WidthProblem, budget: float) -> list[Choice]:
    """Return the choices within the budget met while bisecting for the lowest price per ms that keeps to it."""
    low, high = 0.0, 1.0
    widest = tuple(len(options) - 1 for options in problem.options)
    narrowest = tuple(0 for _ in problem.options)
    found = []
    for _ in range(PRICE_STEPS):
        price = high if not low else math.sqrt(low * high)
        choices = [_coordinate_descent(problem, start, price) for start in (widest, narrowest)]
        within = [choice for choice in choices if problem.ms(choice) <= budget]
        found += within
        if within:
            high, low = price, low or price * 1e-6
        elif price == high:
            low, high = high, high * 4
        else:
            low = price
    return list(dict.fromkeys(found))


def _linearized(problem: WidthProblem, budget: float, choice: Choice) -> Choice | None:
    """Solve the exact knapsack with times linearized around a choice, in the widest range whose result holds.

    Where layers depend on two groups, single changes do not add up, so the options are limited to a shrinking range
    around the choice until the result keeps to the budget and loses less.
    """
    room = budget - problem.ms(choice)
    for radius in (max(map(len, problem.options), default=1), 3, 2, 1):
        spans = [
            range(max(0, here - radius), min(len(options), here + radius + 1))
            for options, here in zip(problem.options, choice, strict=True)
        ]
        times = [
            [problem.change_ms(choice, _replaced(choice, {g: option}), (g,)) for option in span]
            for g, span in enumerate(spans)
        ]
        losses = [[problem.losses[g][option] for option in span] for g, span in enumerate(spans)]
        picked = multiple_choice(times, losses, room)
        if picked is not None:
            result = tuple(span[option] for span, option in zip(spans, picked, strict=True))
            if problem.ms(result) <= budget and problem.loss(result) < problem.loss(choice):
                return result
    return None


def _local_search(problem: WidthProblem, budget: float, choice: Choice) -> Choice:
    """Improve a choice by changing one or two groups at a time within the budget, the best change first."""
    room = budget - problem.ms(choice)
    while True:
        best: tuple[float, float, dict[int, int]] | None = None
        for change in _changes(problem, choice):
            gain = sum(problem.losses[g][choice[g]] - problem.losses[g][option] for g, option in change.items())
            if gain <= LOSS_TOLERANCE or (best is not None and gain <= best[0]):
                continue
            ms = problem.change_ms(choice, _replaced(choice, change), tuple(change))
            if ms <= room:
                best = (gain, ms, change)
        if best is None:
            return choice
        choice, room = _replaced(choice, best[2]), room - best[1]


def _changes(problem: WidthProblem, choice: Choice) -> list[dict[int, int]]:
    """Return other options for one group, and for two."""
    radius = max(map(len, problem.options), default=1)
    if (len(choice) * radius) ** 2 / 2 > MAX_PAIRS:
        radius = 2
    single = [
        [option for option in range(len(options)) if option != here and abs(option - here) <= radius]
        for options, here in zip(problem.options, choice, strict=True)
    ]
    changes = [{g: option} for g, options in enumerate(single) for option in options]
    for a, b in itertools.combinations(range(len(choice)), 2):
        changes += [{a: first, b: second} for first in single[a] for second in single[b]]
    return changes


def _replaced(choice: Choice, change: Mapping[int, int]) -> Choice:
    changed = list(choice)
    for g, option in change.items():
        changed[g] = option
    return tuple(changed)
