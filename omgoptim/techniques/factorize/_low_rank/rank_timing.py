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
from omgoptim.techniques.factorize._low_rank.problem import Option, empty_block
from omgoptim.techniques.factorize._low_rank.rank_allocation import RankChoice
from omgoptim.techniques.probe import uses_of
from omgoptim.techniques.prune._latency.layer_benchmark import bench_of, blocks_ms
from omgoptim.techniques.reconstruction.inputs import DenseLayer
from omgoptim.techniques.registry import ModuleRun

MAX_MEASURED_RANKS = 6
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

    dense_ms: float
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
    measured: dict[tuple[Any, ...], RankTimes] = {}
    timed = {}
    for count, (path, choice) in enumerate(layers.items()):
        picked = options_to_measure(choice.options)
        key = (repr(parts[path]), uses[path].shapes, tuple((option.form, option.ranks) for option in picked))
        if key not in measured:
            measured[key] = measure_options(parts[path], picked, uses[path].shapes, run)
        faster = with_times(choice, picked, measured[key])
        if faster.options:
            timed[path] = faster
        else:
            best, dense = min(measured[key].ranks_ms), measured[key].dense_ms
            reason = f"no rank is faster on {run.runtime}: at best {best:.3f} ms, dense {dense:.3f} ms"
            skipped.append(Skip(path=path, reason=reason, kind="no_benefit"))
        run.progress("timing ranks", 0.4 + 0.1 * (count + 1) / len(layers))
    return timed


def options_to_measure(options: Sequence[Option]) -> list[Option]:
    """Return the options to measure, from the smallest to the largest, evenly spread."""
    places = sorted({round(place) for place in np.linspace(0, len(options) - 1, MAX_MEASURED_RANKS)})
    return [options[place] for place in places]


def with_times(choice: RankChoice, picked: Sequence[Option], times: RankTimes) -> RankChoice:
    """Return the options that are faster than the layer, with times that never fall as parameters grow."""
    rising = np.maximum.accumulate(times.ranks_ms)
    interpolated = np.interp([o.params for o in choice.options], [o.params for o in picked], rising)
    slope = SIZE_TIE_BREAK * times.dense_ms / choice.params
    ms = [
        float(ms_of_option) + slope * option.params
        for option, ms_of_option in zip(choice.options, interpolated, strict=True)
    ]
    faster = [index for index, ms_of_option in enumerate(ms) if ms_of_option < times.dense_ms]
    return replace(
        choice,
        options=tuple(choice.options[index] for index in faster),
        losses=tuple(choice.losses[index] for index in faster),
        times_ms=tuple(ms[index] for index in faster),
        time_ms=times.dense_ms,
    )


def measure_options(
    layer: DenseLayer, picked: Sequence[Option], shapes: Sequence[tuple[int, ...]], run: ModuleRun
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
