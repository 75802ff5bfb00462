"""Benchmark of single layers at chosen widths on one engine, with one session open at a time.

A layer is a module for torch and a program of one node for the other engines. The weights are random: no kernel that is
timed here looks at their values, as long as they are no denormals.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from omgoptim.runtimes import ENGINES, Session, SessionSettings
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.prune._channels.groups import is_depthwise
from omgoptim.techniques.prune._latency.latency_table import tile_size_of
from omgoptim.techniques.registry import ModuleRun

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 18, 8
"""Opset and IR version of ONNX 1.13 (its docs/Versioning.md), which every supported ONNX Runtime and OpenVINO reads."""

INPUT, OUTPUT = "x", "output"

KINDS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
"""Classes of layers that can be timed by themselves."""

TimedLayer = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.Linear

_CONVOLUTIONS: tuple[type[_ConvNd], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Conv1d, nn.Conv2d)

BLOCKS = 4
"""Blocks of calls per visit; the fastest counts. Chosen: more resist disturbances and cost time."""

SHORTEST_BLOCK_S, LONGEST_BLOCK_S = 0.0015, 0.01
"""Bounds of the seconds of a block: above the clock's and the scheduler's resolution, short enough for every point."""

SWEEP = (33, 36, 40, 44, 48, 52, 56, 60, 64, 72, 80, 96)
"""Output widths that distinguish tile sizes of 8, 16 and 32 channels."""


@dataclass(frozen=True, slots=True)
class SizedLayer:
    """A layer of given sizes on an input of a given shape; equal ones take equal time."""

    layer: TimedLayer
    shape: tuple[int, ...]
    """Shape of the whole layer's input; its features are replaced by `in_size`."""
    in_size: int
    out_size: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        if isinstance(self.layer, nn.Linear):
            return (*self.shape[:-1], self.in_size)
        return (*self.shape[: -self.spatial - 1], self.in_size, *self.shape[-self.spatial :])

    @property
    def spatial(self) -> int:
        return 0 if isinstance(self.layer, nn.Linear) else len(self.layer.kernel_size)

    @property
    def groups(self) -> int:
        """Return the convolution groups at these sizes: as many as channels if depthwise, else unchanged."""
        if isinstance(self.layer, nn.Linear):
            return 1
        return self.in_size if is_depthwise(self.layer) else self.layer.groups

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key that is equal for layers of equal time."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            how: tuple[Any, ...] = ("linear",)
        else:
            transposed = isinstance(layer, _ConvTransposeNd)
            how = (transposed, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding)
            how += (self.groups,)
        return (*how, layer.bias is not None, str(layer.weight.dtype), self.input_shape, self.out_size)


def sides(layer: TimedLayer) -> tuple[int, int]:
    """Return the input and output features of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def fits(layer: TimedLayer, in_size: int, out_size: int) -> bool:
    """Return whether a layer can have these sizes: its convolution groups must divide both."""
    if isinstance(layer, nn.Linear) or layer.groups == 1:
        return True
    groups = in_size if is_depthwise(layer) else layer.groups
    return in_size % groups == 0 and out_size % groups == 0


def as_module(sized: SizedLayer, device: str, seed: int) -> nn.Module:
    """Create a module of that size, in eval mode."""
    layer, bias = sized.layer, sized.layer.bias is not None
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            fresh: nn.Module = nn.Linear(sized.in_size, sized.out_size, bias=bias)
        else:
            options: dict[str, Any] = {
                "stride": layer.stride,
                "padding": layer.padding,
                "dilation": layer.dilation,
                "groups": sized.groups,
                "bias": bias,
            }
            if isinstance(layer, _ConvTransposeNd):
                options["output_padding"] = layer.output_padding
            kind: Any = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))  # a subclass may do more
            fresh = kind(sized.in_size, sized.out_size, layer.kernel_size, **options)
    fresh = fresh.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_(generator=generator)
    return fresh.to(device=device, dtype=layer.weight.dtype).eval().requires_grad_(False)


def write_program(layers: Sequence[nn.Module], shape: Sequence[int], path: Path) -> Path:
    """Write an ONNX file of layers, one after the other, with their weights.

    Args:
        layers: of `KINDS`; float32 or written as such.
        shape: of the first one's input.
        path: the file to write.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    name = INPUT
    for index, layer in enumerate(layers):
        assert isinstance(layer, KINDS)  # what blocks are made of
        gemm = isinstance(layer, nn.Linear) and len(shape) == 2
        weight = layer.weight.detach().float().cpu().numpy()
        weight = weight.T if isinstance(layer, nn.Linear) and not gemm else weight
        stored = {f"weight_{index}": weight}
        if layer.bias is not None:
            stored[f"bias_{index}"] = layer.bias.detach().float().cpu().numpy()
        tensors += [numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in stored.items()]
        output = OUTPUT if index == len(layers) - 1 else f"between_{index}"
        nodes += _nodes(layer, [name, *stored], output, gemm)
        name = output
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, None)],
        tensors,
    )
    return save(graph, path)


def write_empty_program(path: Path) -> Path:
    """Write an ONNX file with a trivial operator: the overhead of a call."""
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, (1, 1))
    result = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, (1, 1))
    return save(helper.make_graph([helper.make_node("Relu", [INPUT], [OUTPUT])], "empty", [value], [result]), path)


def save(graph: onnx.GraphProto, path: Path) -> Path:
    """Write a graph as a model of `OPSET`."""
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString())
    return path


def signature_of(shape: Sequence[int], dtype: str = "float32") -> Signature:
    """Return the signature of a single layer."""
    return Signature((InputTensor(INPUT, dtype, tuple(shape), False),), "tensor")


def _nodes(layer: TimedLayer, inputs: list[str], output: str, gemm: bool) -> list[onnx.NodeProto]:
    """Return the nodes of a layer as the exporter writes it: Conv, ConvTranspose, Gemm, or MatMul and Add."""
    from onnx import helper

    if isinstance(layer, nn.Linear):
        if gemm:
            return [helper.make_node("Gemm", inputs, [output], transB=1)]
        if layer.bias is None:
            return [helper.make_node("MatMul", inputs, [output])]
        product = f"{output}_product"
        return [
            helper.make_node("MatMul", inputs[:2], [product]),
            helper.make_node("Add", [product, inputs[2]], [output]),
        ]
    reversed_pads = layer._reversed_padding_repeated_twice  # last dimension first, begin and end of each
    options: dict[str, Any] = {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "dilations": layer.dilation,
        "group": layer.groups,
        "pads": [*reversed_pads[-2::-2], *reversed_pads[::-2]],
    }
    if isinstance(layer, _ConvTransposeNd):
        return [helper.make_node("ConvTranspose", inputs, [output], output_padding=layer.output_padding, **options)]
    return [helper.make_node("Conv", inputs, [output], **options)]


@dataclass(frozen=True, slots=True)
class Bench:
    """Engine and settings with which single layers are timed."""

    runtime: str
    settings: SessionSettings
    scratch: Path
    seed: int

    def open(self, sized: SizedLayer) -> tuple[Session, Any]:
        """Open a session of the layer alone, and an input for it."""
        return self.open_module(as_module(sized, self.settings.device, self.seed), sized.input_shape)

    def open_module(self, module: nn.Module, shape: tuple[int, ...]) -> tuple[Session, Any]:
        """Open a session of a layer, or of a block of layers, and an input of a shape for it."""
        if ENGINES[self.runtime].runs == "program":
            layers = list(module.children()) or [module]
            return self._session(write_program(layers, shape, self.scratch / "layer.onnx"), shape, "float32")
        return self._session(module, shape, str(next(module.parameters()).dtype).removeprefix("torch."))

    def empty_call_ms(self) -> float:
        """Return the overhead of a call of the engine, to be subtracted from a node's time; 0 for a module."""
        if ENGINES[self.runtime].runs == "module":
            return 0.0
        program = write_empty_program(self.scratch / "empty.onnx")
        session, prepared = self._session(program, (1, 1), "float32")
        return min(fastest_block_ms(session, prepared, SHORTEST_BLOCK_S) for _ in range(2))

    def _session(self, model: Any, shape: tuple[int, ...], dtype: str) -> tuple[Session, Any]:
        session = ENGINES[self.runtime].open(model, signature_of(shape, dtype), self.settings)
        values = np.random.default_rng(self.seed).standard_normal(shape, dtype=np.float32)
        return session, session.prepare({INPUT: values})


@dataclass(slots=True)
class Times:
    """Fastest time of each point by pass."""

    by_point: dict[tuple[Any, ...], list[float]] = field(default_factory=dict)

    def ms(self, point: SizedLayer) -> float:
        return min(self.by_point[point.key])

    def relative_gap(self, point: SizedLayer) -> float:
        """Return the relative distance of the second fastest visit from the fastest."""
        return _relative_gap(self.by_point[point.key])

    def scatter(self) -> float:
        """Return the relative scatter of the two fastest visits: the 90 % quantile over the points."""
        spreads = sorted(_relative_gap(visits_ms) for visits_ms in self.by_point.values() if len(visits_ms) > 1)
        return spreads[int(0.9 * (len(spreads) - 1))] if spreads else 0.0


def _relative_gap(visits_ms: Sequence[float]) -> float:
    fastest = sorted(visits_ms)[:2]
    return fastest[-1] / fastest[0] - 1


@contextmanager
def open_bench(run: ModuleRun) -> Iterator[Bench]:
    """Lock the device and yield a benchmark; torch's number of threads is restored."""
    runtime = "torch_eager" if run.runtime == "torch_compile" else run.runtime
    threads = torch.get_num_threads()
    try:
        with run.measuring(), tempfile.TemporaryDirectory(dir=run.scratch) as folder:
            yield Bench(runtime, SessionSettings(run.threads, run.device), Path(folder), run.seed)
    finally:
        torch.set_num_threads(threads)


def time_points(
    points: Sequence[SizedLayer], bench: Bench, block_s: float, seed: int, end: float | None = None
) -> dict[tuple[Any, ...], float]:
    """Return the milliseconds of each point by its key, in random order, one session open at a time.

    Args:
        points: layers at sizes, each once.
        bench: where.
        block_s: seconds per block of calls.
        seed: of the order.
        end: when to stop, on the clock of `time.perf_counter`, whatever is left.
    """
    ms: dict[tuple[Any, ...], float] = {}
    for point in random.Random(seed).sample(points, len(points)):
        if end is not None and time.perf_counter() > end:
            break
        session, prepared = bench.open(point)
        ms[point.key] = fastest_block_ms(session, prepared, block_s)
    return ms


def fastest_block_ms(session: Session, prepared: Any, block_s: float) -> float:
    """Return the milliseconds per call, the fastest of a few blocks after a warm-up."""
    session.seconds(prepared, 2)
    calls = max(1, round(block_s / max(session.seconds(prepared, 1), 1e-7)))
    return 1e3 * min(session.seconds(prepared, calls) for _ in range(BLOCKS))


def measure_tile_size(module: nn.Module, run: ModuleRun) -> int:
    """Return this machine's tile size in channels, measured by a sweep of twelve widths; 8 if none is clear.

    A convolution on a 14x14 map where the module has convolutions, else a Linear on 64 rows; about a second.
    """
    convolutions = any(isinstance(part, nn.Conv2d) for part in module.modules())
    layer: TimedLayer = nn.Conv2d(64, 96, 3, padding=1, bias=False) if convolutions else nn.Linear(256, 96)
    shape = (1, 64, 14, 14) if convolutions else (1, 64, 256)
    points = {width: SizedLayer(layer, shape, sides(layer)[0], width) for width in SWEEP}
    with open_bench(run) as bench:
        passes = [time_points(list(points.values()), bench, LONGEST_BLOCK_S, seed) for seed in range(2)]
    return tile_size_of({width: min(times[point.key] for times in passes) for width, point in points.items()})
