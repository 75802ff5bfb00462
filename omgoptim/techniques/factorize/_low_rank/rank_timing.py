"""Latency of a layer by rank, measured on the engine that the artifact will run on.

A block is timed alone at the input shapes that the layer sees in one forward at batch 1, at a few of its ranks; between
them the time is interpolated over the parameters. For torch it is the module itself (torch_compile counts as
torch_eager: compiling every rank would take minutes), for ONNX Runtime and OpenVINO a program of its MatMul or Conv
nodes. One session is open at a time; the points are visited in several turns, and the fastest block of calls counts:
what other programs do only ever adds. Equal layers are measured once. What a time alone cannot show is what an engine
fuses with neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from omgoptim.reports import Skip
from omgoptim.techniques.factorize._low_rank.problem import RankOption, empty_block
from omgoptim.techniques.factorize._low_rank.rank_allocation import RankChoice
from omgoptim.techniques.probe import uses_of
from omgoptim.techniques.prune._latency.layer_benchmark import bench_of, blocks_ms
from omgoptim.techniques.reconstruction.inputs import DenseLayer
from omgoptim.techniques.registry import ModuleRun

POINTS = 6
"""Maximum measured ranks of a layer; between them time is interpolated. Chosen: each costs `TURNS` visits."""

TURNS = 3
"""Visits of each measurement point, of which the fastest counts. Chosen: two of three may be disturbed."""

BLOCK_S = 0.005
"""Seconds of a block of calls. Chosen: above the clock's and the scheduler's resolution, short for every point."""

SIZE_TIE_BREAK = 1e-6
"""Fraction of a layer's time that its parameters count for. Chosen small: of equally fast ranks the smaller wins."""


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Measured times of a layer in one forward."""

    whole_ms: float
    ranks_ms: tuple[float, ...]
    """Times of the measured options."""


def measure_times(
    module: nn.Module, layers: Mapping[str, RankChoice], run: ModuleRun, skipped: list[Skip]
) -> dict[str, RankChoice]:
    """Return the layers with the times of their options, less the options that are no faster.

    Args:
        module: where the layers are; run once to see the shapes.
        layers: path to its options.
        run: gives engine, device and threads.
        skipped: gets the layers that no rank makes faster.
    """
    parts: dict[str, DenseLayer] = {path: module.get_submodule(path) for path in layers}  # type: ignore[misc]
    uses = uses_of(module, parts, run, samples=1)
    known: dict[tuple[Any, ...], RankTimes] = {}
    timed = {}
    for count, (path, layered) in enumerate(layers.items()):
        picked = picked_of(layered.options)
        key = (repr(parts[path]), uses[path].shapes, tuple((option.form, option.ranks) for option in picked))
        if key not in known:
            known[key] = measured(parts[path], picked, uses[path].shapes, run)
        faster = with_times(layered, picked, known[key])
        if faster.options:
            timed[path] = faster
        else:
            best, whole = min(known[key].ranks_ms), known[key].whole_ms
            reason = f"no rank is faster on {run.runtime}: at best {best:.3f} ms, dense {whole:.3f} ms"
            skipped.append(Skip(path=path, reason=reason, kind="no_benefit"))
        run.progress("timing ranks", 0.4 + 0.1 * (count + 1) / len(layers))
    return timed


def picked_of(options: Sequence[RankOption]) -> list[RankOption]:
    """Return the options to measure, from the smallest to the largest, evenly spread."""
    places = sorted({round(place) for place in np.linspace(0, len(options) - 1, POINTS)})
    return [options[place] for place in places]


def with_times(layered: RankChoice, picked: Sequence[RankOption], times: RankTimes) -> RankChoice:
    """Return the options that are faster than the layer, with times that never fall as parameters grow."""
    rising = np.maximum.accumulate(times.ranks_ms)
    given = np.interp([o.params for o in layered.options], [o.params for o in picked], rising)
    slope = SIZE_TIE_BREAK * times.whole_ms / layered.params
    ms = [float(one) + slope * option.params for option, one in zip(layered.options, given, strict=True)]
    faster = [index for index, one in enumerate(ms) if one < times.whole_ms]
    return replace(
        layered,
        options=tuple(layered.options[index] for index in faster),
        losses=tuple(layered.losses[index] for index in faster),
        times_ms=tuple(ms[index] for index in faster),
        time_ms=times.whole_ms,
    )


def measured(
    layer: DenseLayer, picked: Sequence[RankOption], shapes: Sequence[tuple[int, ...]], run: ModuleRun
) -> RankTimes:
    """Return the milliseconds of the layer and of the blocks in its place, summed over its calls in one forward."""
    timed: list[nn.Module] = [layer, *(empty_block(layer, option) for option in picked)]
    totals = [0.0] * len(timed)
    with bench_of(run) as bench:
        for shape in sorted(set(shapes)):
            best = [float("inf")] * len(timed)
            for _ in range(TURNS):
                for index, module in enumerate(timed):
                    best[index] = min(best[index], blocks_ms(*bench.open_module(module, shape), BLOCK_S))
            totals = [total + shapes.count(shape) * ms for total, ms in zip(totals, best, strict=True)]
    return RankTimes(totals[0], tuple(totals[1:]))
