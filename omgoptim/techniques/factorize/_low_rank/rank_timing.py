"""Latency of a layer by rank, measured on the engine that the artifact will run on.

A block is timed alone at the input shapes that the layer sees in one forward at batch 1, at a few of its ranks; between
them the time is interpolated over the parameters. For torch it is the module itself (torch_compile counts as
torch_eager: compiling every rank would take minutes), for ONNX Runtime and OpenVINO a program of its MatMul or Conv
nodes. One session is open at a time; the points are visited in several turns, and the fastest block of calls counts:
what other programs do only ever adds. Equal layers are measured once. What a time alone cannot show is what an engine
fuses with neighbours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from omgoptim.reports import Skip
from omgoptim.runtimes import ENGINES, Session, SessionSettings
from omgoptim.techniques.factorize._low_rank.layer_selection import uses_of
from omgoptim.techniques.factorize._low_rank.problem import Option, empty_block
from omgoptim.techniques.factorize._low_rank.rank_allocation import RankChoice
from omgoptim.techniques.prune._latency.layer_benchmark import INPUT, OUTPUT, blocks_ms, save, signature_of
from omgoptim.techniques.reconstruction.inputs import DenseLayer
from omgoptim.techniques.registry import ModuleRun

if TYPE_CHECKING:
    import onnx

POINTS = 6
"""Maximum measured ranks of a layer; between them time is interpolated over the parameters."""

TURNS = 3
"""Visits of each measurement point, of which the fastest counts: two may be disturbed."""

BLOCK_S = 0.005
"""Seconds of one block of calls, above the clock's and the scheduler's resolution."""

SLOPE = 1e-6
"""Tie-breaker: fraction of a layer's time that all its parameters count for: of two equally fast ranks, the smaller
one.
"""


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
            reason = f"no rank is faster on {run.runtime}: {best:.3f} ms at best, {whole:.3f} ms as it is"
            skipped.append(Skip(path=path, reason=reason, kind="no_benefit"))
        run.progress("timing ranks", 0.4 + 0.1 * (count + 1) / len(layers))
    return timed


def picked_of(options: Sequence[Option]) -> list[Option]:
    """Return the options to measure, from the smallest to the largest, evenly spread."""
    places = sorted({round(place) for place in np.linspace(0, len(options) - 1, POINTS)})
    return [options[place] for place in places]


def with_times(layered: RankChoice, picked: Sequence[Option], times: RankTimes) -> RankChoice:
    """Return the options that are faster than the layer, with times that never fall as parameters grow."""
    rising = np.maximum.accumulate(times.ranks_ms)
    given = np.interp([o.params for o in layered.options], [o.params for o in picked], rising)
    slope = SLOPE * times.whole_ms / layered.params
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
    layer: DenseLayer, picked: Sequence[Option], shapes: Sequence[tuple[int, ...]], run: ModuleRun
) -> RankTimes:
    """Return the milliseconds of the layer and of the blocks in its place, summed over its calls in one forward."""
    subjects: list[nn.Module] = [layer, *(empty_block(layer, option) for option in picked)]
    totals = [0.0] * len(subjects)
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(dir=run.scratch) as folder:
            for shape in sorted(set(shapes)):
                best = [float("inf")] * len(subjects)
                for _ in range(TURNS):
                    for index, loaded in enumerate(subjects):
                        best[index] = min(best[index], _visit(loaded, shape, run, Path(folder)))
                totals = [total + shapes.count(shape) * ms for total, ms in zip(totals, best, strict=True)]
    finally:
        torch.set_num_threads(threads)
    return RankTimes(totals[0], tuple(totals[1:]))


def _visit(loaded: nn.Module, shape: tuple[int, ...], run: ModuleRun, folder: Path) -> float:
    session, prepared = _open(loaded, shape, run, folder)
    return blocks_ms(session, prepared, BLOCK_S)


def _open(loaded: nn.Module, shape: tuple[int, ...], run: ModuleRun, folder: Path) -> tuple[Session, Any]:
    engine = ENGINES["torch_eager" if run.runtime == "torch_compile" else run.runtime]
    thing: Any = loaded
    dtype = "float32"
    if engine.runs == "program":
        thing = write_program(list(loaded.children()) or [loaded], shape, folder / "layer.onnx")
    else:
        dtype = str(next(loaded.parameters()).dtype).removeprefix("torch.")
    session = engine.open(thing, signature_of(shape, dtype), SessionSettings(run.threads, run.device))
    values = np.random.default_rng(run.seed).standard_normal(shape, dtype=np.float32)
    return session, session.prepare({INPUT: values})


def write_program(layers: Sequence[nn.Module], shape: Sequence[int], path: Path) -> Path:
    """Write an ONNX file of Linear layers or of convolutions, one after the other, with their weights.

    Args:
        layers: nn.Linear or nn.Conv2d, float32 or written as such.
        shape: of the first one's input.
        path: the file to write.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    name = INPUT
    for index, layer in enumerate(layers):
        assert isinstance(layer, (nn.Linear, nn.Conv2d))  # what blocks are made of
        weight = layer.weight.detach().float().cpu()
        names = [f"weight_{index}"]
        tensors.append(numpy_helper.from_array((weight.mT if weight.dim() == 2 else weight).numpy().copy(), names[0]))
        if layer.bias is not None:
            names.append(f"bias_{index}")
            tensors.append(numpy_helper.from_array(layer.bias.detach().float().cpu().numpy(), names[1]))
        output = OUTPUT if index == len(layers) - 1 else f"between_{index}"
        nodes += (
            _conv(layer, [name, *names], output) if isinstance(layer, nn.Conv2d) else _linear([name, *names], output)
        )
        name = output
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, None)],
        tensors,
    )
    return save(graph, path)


def _linear(inputs: list[str], output: str) -> list[onnx.NodeProto]:
    from onnx import helper

    if len(inputs) == 2:
        return [helper.make_node("MatMul", inputs, [output])]
    product = f"{output}_product"
    return [
        helper.make_node("MatMul", inputs[:2], [product]),
        helper.make_node("Add", [product, inputs[2]], [output]),
    ]


def _conv(layer: nn.Conv2d, inputs: list[str], output: str) -> list[onnx.NodeProto]:
    from onnx import helper

    left, right, above, below = layer._reversed_padding_repeated_twice
    how = {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "dilations": list(layer.dilation),
        "pads": [above, left, below, right],
        "group": layer.groups,
    }
    return [helper.make_node("Conv", inputs, [output], **how)]
