"""Measure how the time of each prunable layer depends on its width, on the engine the artifact will run on.

Every layer is timed alone, with the input shapes it sees in one forward at batch 1, at widths on a grid: as the module
for torch (torch_compile counts as torch_eager: compiling each width would take minutes), as a program of one node for
ONNX Runtime and OpenVINO. One engine, one session open at a time, as idle threads of another would disturb it. Each
point is visited in two passes, each in a new random order, and the fastest of its blocks counts: what other programs do
only ever adds. A point whose fastest visit none confirms, or that is slower than a wider one, is visited again while
there is time. Falls that stay and lie within the scatter between visits are smoothed (`smooth`).

What a time alone cannot show: fusing with neighbours, and the change of memory layout at a program's ends, which a
whole network does once and a single node every time. The search corrects its target by times of the whole model.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.techniques.probe import layer_calls
from omgoptim.techniques.prune._channels.groups import Group, Place, is_depthwise
from omgoptim.techniques.prune._latency import layer_benchmark
from omgoptim.techniques.prune._latency.latency_table import LayerTimes, Side, TimeTable, smooth
from omgoptim.techniques.prune._latency.layer_benchmark import (
    BLOCKS,
    LONGEST_BLOCK_S,
    SHORTEST_BLOCK_S,
    Bench,
    SizedLayer,
    TimedLayer,
    Times,
    open_bench,
    sides,
    time_points,
)
from omgoptim.techniques.registry import ModuleRun

MIN_WIDTH = 0.1
"""Minimum measured width as a fraction of a group's width: what the default `max_layer_ratio` leaves."""

PASSES, MAX_VISITS = 2, 6
"""Visits of every point, and of a point that is remeasured."""

MAX_SCATTER = 0.05
"""Relative scatter of the two fastest visits that has a point remeasured. Chosen: visits against noise."""

PASS_TIME_SHARE = 0.7
"""Fraction of the time for the passes; the rest is for remeasuring. Chosen: more widths against less scatter."""

MIN_WIDTHS = 3
"""Minimum number of widths per side of a layer, however short the time. Chosen: two give a line, the third a bend."""

MAX_NOISE = 0.25
"""Maximum relative fall that is smoothed, whatever the scatter. Chosen: a larger one is a kernel of its own."""

MIN_CALL_SHARE = 0.05
"""Minimum share of its call that a node counts for, however long the empty call took. Chosen: keeps times above 0."""


def widths_of(
    group: Group, count: int, round_to: int | None = None, min_fraction: float = MIN_WIDTH
) -> tuple[int, ...]:
    """Return at most `count` candidate widths of a group, evenly spread, ascending, the last one full.

    Multiples of its unit and of `round_to` (as `Group.step` takes it), from the fraction `min_fraction` of its width
    on. Where that leaves nothing below the full width, multiples of the unit alone.
    """
    for step in (group.step(round_to), group.unit):
        first = step * max(1, math.ceil(group.width * min_fraction / step - 1e-9))
        steps = list(range(first, group.width, step))
        if steps:
            break
    return evenly_spread([*steps, group.width], count)


def side_of(size: int, places: Sequence[tuple[Group, Place]]) -> Side:
    """Return how a side of `size` features depends on the groups with places on it."""
    features: dict[str, int] = {}
    for group, place in places:
        features[group.name] = features.get(group.name, 0) + len(place.positions) // group.width
    decided = {group.name: features[group.name] * group.width for group, _ in places}
    return Side(size - sum(decided.values()), tuple(features.items()))


def sizes_of(
    side: Side, candidates: Mapping[str, tuple[int, ...]], full: Mapping[str, int], count: int
) -> tuple[int, ...]:
    """Return the sizes of a side when its groups shrink together, the full one last."""
    widths_by_group = {name: evenly_spread(candidates[name], count) for name, _ in side.parts}
    steps = max((len(widths) for widths in widths_by_group.values()), default=1)
    sizes = {
        side.size(
            {**full} | {name: widths[max(0, len(widths) - steps + step)] for name, widths in widths_by_group.items()}
        )
        for step in range(steps)
    }
    return tuple(sorted(sizes))


def evenly_spread(values: Sequence[int], count: int) -> tuple[int, ...]:
    """Return `count` of ascending values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return tuple(values)
    return tuple(values[round(step * (len(values) - 1) / (count - 1))] for step in range(count))


@dataclass(slots=True)
class _Member:
    """A layer of some groups, and the sizes at which it is measured."""

    path: str
    layer: TimedLayer
    shapes: Counter[tuple[int, ...]]
    """Input shape to how often the layer is called with it in one forward."""
    in_side: Side
    out_side: Side
    ins: tuple[int, ...] = ()
    outs: tuple[int, ...] = ()

    @property
    def tied(self) -> bool:
        """True if the output's width determines the input's."""
        return is_depthwise(self.layer) or (bool(self.in_side.parts) and self.in_side.parts == self.out_side.parts)

    def sized(self, shape: tuple[int, ...], in_size: int | None, out_size: int) -> SizedLayer:
        """Return the layer at an output width, and an input width unless the output determines it."""
        if in_size is None:
            full_in, full_out = sides(self.layer)
            in_size = full_in - (full_out - out_size)
        return SizedLayer(self.layer, shape, in_size, out_size)

    def rows(self) -> tuple[int | None, ...]:
        return (None,) if self.tied else self.ins

    def points(self) -> Iterator[SizedLayer]:
        for shape in self.shapes:
            for in_size in self.rows():
                yield from (self.sized(shape, in_size, out_size) for out_size in self.outs)


def measure_layer_times(
    module: nn.Module,
    groups: Sequence[Group],
    run: ModuleRun,
    widths_per_group: int = 8,
    round_to: int | None = None,
    budget_s: float = 30.0,
) -> TimeTable:
    """Time every layer that belongs to a group at several widths, on the run's engine, threads and device.

    Args:
        module: not changed; run once in eval mode to see the shapes.
        groups: the groups to choose widths for, at their full width.
        run: gives the engine, the inputs and the seed.
        widths_per_group: how many widths of a group to measure, its full one among them; fewer where time is short.
        round_to: what widths are multiples of, as `Group.step` takes it.
        budget_s: about how many seconds to spend. Equal layers are measured once.

    Raises:
        TechniqueError: no member of any group is a layer that can be timed.
    """
    shapes = _input_shapes(module, run)
    candidates = {group.name: widths_of(group, widths_per_group, round_to) for group in groups}
    members, unmeasured = _members(module, groups, shapes)
    if not members:
        raise TechniqueError(
            "no prunable layer can be timed on its own",
            f"none of them is called as a convolution or Linear: {', '.join(unmeasured[:10]) or 'there are none'}",
            "give a pruning_ratio or target_macs_ratio instead",
        )
    full = {group.name: group.width for group in groups}
    with open_bench(run) as bench:
        empty = bench.empty_call_ms()
        grids = _fit_to_budget(members, candidates, full, bench, budget_s)
        times = _measure(grids, bench, budget_s, run)
    noise = min(max(2 * times.scatter(), MAX_SCATTER), MAX_NOISE)
    layers = tuple(_layer_times(member, times, empty, noise) for member in grids)
    return TimeTable(bench.runtime, full, candidates, layers, tuple(unmeasured))


def _input_shapes(module: nn.Module, run: ModuleRun) -> dict[str, Counter[tuple[int, ...]]]:
    """Return the shapes of each layer's calls in one forward at batch 1, for the layers that can be timed."""
    layers = {path: part for path, part in module.named_modules() if isinstance(part, layer_benchmark.KINDS)}
    return {path: Counter(use.shapes) for path, use in layer_calls(module, layers, run, samples=1).items()}


def _members(
    module: nn.Module, groups: Sequence[Group], shapes: Mapping[str, Counter[tuple[int, ...]]]
) -> tuple[list[_Member], list[str]]:
    """Return the layers to measure, and those that cannot be measured; norms and parameters are neither."""
    parts = dict(module.named_modules())
    found: dict[str, dict[str, list[tuple[Group, Place]]]] = {}
    for group in groups:
        for place in group.places:
            if place.axis is None:
                found.setdefault(place.path, {"in": [], "out": []})[place.side].append((group, place))
    members, unmeasured = [], []
    for path, of_side in found.items():
        layer = parts[path]
        if isinstance(layer, layer_benchmark.KINDS) and path in shapes:
            in_size, out_size = sides(layer)
            members.append(
                _Member(path, layer, shapes[path], side_of(in_size, of_side["in"]), side_of(out_size, of_side["out"]))
            )
        elif getattr(layer, "weight", None) is not None and layer.weight.dim() > 1:
            unmeasured.append(path)
    return members, unmeasured


def _fit_to_budget(
    members: Sequence[_Member],
    candidates: Mapping[str, tuple[int, ...]],
    full: Mapping[str, int],
    bench: Bench,
    budget_s: float,
) -> list[_Member]:
    """Return the members with as many sizes per side as the budget allows, estimated by one call of each."""
    cost: dict[tuple[Any, ...], float] = {}
    max_widths = max(MIN_WIDTHS, *(len(widths) for widths in candidates.values()))
    for member in members:
        for shape in member.shapes:
            point = SizedLayer(member.layer, shape, *sides(member.layer))
            if point.key not in cost:
                start = time.perf_counter()
                session, prepared = bench.open(point)
                call_s = session.seconds(prepared, 2)
                cost[point.key] = time.perf_counter() - start + BLOCKS * max(call_s, SHORTEST_BLOCK_S)
    for count in range(max_widths, MIN_WIDTHS - 1, -1):
        grids = [_with_grid(member, candidates, full, count) for member in members]
        points = {
            point.key: cost[SizedLayer(member.layer, point.shape, *sides(member.layer)).key]
            for member in grids
            for point in member.points()
        }
        if PASSES * sum(points.values()) <= PASS_TIME_SHARE * budget_s:
            break
    return grids


def _with_grid(
    member: _Member, candidates: Mapping[str, tuple[int, ...]], full: Mapping[str, int], count: int
) -> _Member:
    full_in, full_out = sides(member.layer)
    outs = sizes_of(member.out_side, candidates, full, count)
    ins = sizes_of(member.in_side, candidates, full, count)
    if member.tied:
        ins = ins[-1:]
        outs = tuple(out for out in outs if _fits(member, None, out))
    else:
        outs = tuple(out for out in outs if layer_benchmark.fits(member.layer, full_in, out))
        ins = tuple(into for into in ins if layer_benchmark.fits(member.layer, into, full_out))
    return replace(member, ins=ins, outs=outs)


def _fits(member: _Member, in_size: int | None, out_size: int) -> bool:
    point = member.sized((), in_size, out_size)
    return point.in_size > 0 and layer_benchmark.fits(member.layer, point.in_size, point.out_size)


def _measure(members: Sequence[_Member], bench: Bench, budget_s: float, run: ModuleRun) -> Times:
    """Measure every point in every pass, then remeasure doubtful ones while there is time."""
    points = list({point.key: point for member in members for point in member.points()}.values())
    times = Times()
    end = time.perf_counter() + budget_s
    block_s = SHORTEST_BLOCK_S
    for number in range(MAX_VISITS):
        doubtful = points if number < PASSES else _unreliable_points(members, times)
        if not doubtful or (number >= PASSES and time.perf_counter() > end):
            break
        start = time.perf_counter()
        for key, ms in time_points(doubtful, bench, block_s, run.seed + number, end if number else None).items():
            times.by_point.setdefault(key, []).append(ms)
        if number == 0:  # what is left of the time goes into longer blocks
            spare = (end - start) / PASSES - (time.perf_counter() - start)
            block_s = min(max(block_s + spare / (len(points) * BLOCKS), SHORTEST_BLOCK_S), LONGEST_BLOCK_S)
        run.progress("timing layers at several widths", min(1.0, (number + 1) / PASSES))
    return times


def _unreliable_points(members: Sequence[_Member], times: Times) -> list[SizedLayer]:
    """Return the points without two close visits, and those that are slower than the next larger one."""
    doubtful: dict[tuple[Any, ...], SizedLayer] = {}
    for member in members:
        for shape in member.shapes:
            table = [[member.sized(shape, in_size, out_size) for out_size in member.outs] for in_size in member.rows()]
            rows = [*table, *(list(column) for column in zip(*table, strict=True))]
            falls = (
                narrow
                for row in rows
                for narrow, wide in itertools.pairwise(row)
                if times.ms(narrow) > times.ms(wide) * (1 + MAX_SCATTER)
            )
            scattered = (point for row in table for point in row if times.relative_gap(point) > MAX_SCATTER)
            doubtful |= {point.key: point for point in (*falls, *scattered)}
    return list(doubtful.values())


def _layer_times(member: _Member, times: Times, empty_ms: float, noise: float) -> LayerTimes:
    def ms(in_size: int | None, out_size: int) -> float:
        calls_ms = {shape: times.ms(member.sized(shape, in_size, out_size)) for shape in member.shapes}
        return sum(member.shapes[shape] * max(ms - empty_ms, MIN_CALL_SHARE * ms) for shape, ms in calls_ms.items())

    table = [[ms(in_size, out_size) for out_size in member.outs] for in_size in member.rows()]
    return LayerTimes(member.path, member.in_side, member.out_side, member.ins, member.outs, smooth(table, noise))
