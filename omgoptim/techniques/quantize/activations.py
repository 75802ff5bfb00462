"""Run a program on calibration batches and read tensors inside it, slice by slice. Registers no technique.

All tensors of a network at once are many times its inputs: a slice is as many samples as fit `SLICE_BYTES`, if the
program's batch is free, so that memory does not grow with the calibration set.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.models.onnx_file import bodies, graphs, is_large, save
from omgoptim.techniques.quantize.calibration import Batch, size_of
from omgoptim.techniques.quantize.onnx_file import as_technique_error

SLICE_BYTES = 2**28
"""Bytes of watched tensors that may be held at once."""

SILENCE_DB = 120.0
"""What is told where no noise is left."""

Values = dict[str, NDArray[Any]]


def float_tensors(model: ModelProto) -> list[str]:
    """Names of the float32 tensors of the main graph that are computed or given, as far as types are known."""
    known = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    names = [value.name for value in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return [name for name in dict.fromkeys(names) if known.get(name) == onnx.TensorProto.FLOAT]


class Watch:
    """A session of a program whose inner tensors can be read.

    Args:
        model: the program; it is not changed.
        names: tensors to read, inputs among them; empty: the outputs only.
        exact: whether every node is run as it is written, so that a quantized program computes what its integers stand
            for in float; otherwise the engine optimizes, which is faster.
        threads: of the engine.
    """

    def __init__(self, model: ModelProto, names: Sequence[str] = (), *, exact: bool = False, threads: int = 1):
        self.inputs = {value.name for value in model.graph.input}
        self.names = list(names) or [value.name for value in model.graph.output]
        self.sliceable = has_free_batch(model)
        self.slice = 0  # samples; 0: not known yet
        self.computed = [name for name in dict.fromkeys(self.names) if name not in self.inputs]
        level = "ORT_DISABLE_ALL" if exact else "ORT_ENABLE_ALL"
        self.session = open_program(_only(model, self.computed), threads, level) if self.computed else None

    def run(self, batch: Batch) -> Values:
        """The watched tensors of a batch."""
        found: Values = {}
        if self.session is not None:
            with as_technique_error("the program does not run on the calibration data"):
                found = dict(zip(self.computed, self.session.run(self.computed, batch), strict=True))
        return {name: np.asarray(found[name] if name in found else batch[name]) for name in self.names}

    def slices(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Values]]:
        """Every batch in slices, each with the watched tensors."""
        for batch in batches:
            size = size_of(batch)
            if not self.sliceable or any(array.ndim == 0 or len(array) != size for array in batch.values()):
                yield batch, self.run(batch)
                continue
            start = 0
            while start < size:
                part = {name: array[start : start + (self.slice or 1)] for name, array in batch.items()}
                values = self.run(part)
                start += self.slice or 1
                if not self.slice:
                    self.slice = max(1, SLICE_BYTES // max(1, sum(array.nbytes for array in values.values())))
                yield part, values


def outputs(model: ModelProto, batches: Sequence[Batch], threads: int = 1) -> list[Values]:
    """The program's outputs, batch by batch."""
    watch = Watch(model, threads=threads)
    return [watch.run(batch) for batch in batches]


def sqnr_db(want: Sequence[Values], got: Sequence[Values]) -> float:
    """Signal to quantization noise of the outputs, in dB; of an output that is no number -inf."""
    return decibels(noise_over_signal([list(one.values()) for one in want], [list(one.values()) for one in got]))


def noise_over_signal(want: Sequence[Sequence[NDArray[Any]]], got: Sequence[Sequence[NDArray[Any]]]) -> float:
    """E[(y - y')^2] / E[y^2] of outputs, batch by batch lists of arrays: the mean over outputs.

    An output of integers counts for nothing, and so do positions that are not finite in `want` (a mask). Infinite where
    `got` is not finite and `want` is.
    """
    ratios = []
    for index, first in enumerate(want[0]):
        if not np.issubdtype(np.asarray(first).dtype, np.floating):
            continue
        signal = noise = 0.0
        for before, after in ((np.asarray(a[index]), np.asarray(b[index])) for a, b in zip(want, got, strict=True)):
            counts = np.isfinite(before)
            known, given = before[counts].astype(np.float64), after[counts].astype(np.float64)
            if not np.isfinite(given).all():
                return math.inf
            signal += float(np.square(known).sum())
            noise += float(np.square(given - known).sum())
        ratios.append(noise / signal if signal > 0 else (1.0 if noise > 0 else 0.0))
    return float(np.mean(ratios)) if ratios else 0.0


def decibels(noise_over_signal: float) -> float:
    """-10 log10 of it; at most `SILENCE_DB`, and -inf for an infinite one."""
    if math.isinf(noise_over_signal):
        return -math.inf
    return min(SILENCE_DB, -10 * math.log10(noise_over_signal)) if noise_over_signal > 0 else SILENCE_DB


def open_program(model: ModelProto, threads: int, level: str = "ORT_ENABLE_ALL") -> Any:
    """A session on a program in memory; what is too large for a message goes through a file that is gone afterwards.

    Args:
        level: name of ONNX Runtime's graph optimization level. At `ORT_ENABLE_BASIC` and below, pairs of
            QuantizeLinear and DequantizeLinear are computed as they are written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC"):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    providers = ["CPUExecutionProvider"]
    with as_technique_error("ONNX Runtime cannot open the program"):
        if not is_large(model):
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "program.onnx")
            return onnxruntime.InferenceSession(str(Path(folder) / "program.onnx"), options, providers=providers)


def _only(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy of the program that computes the named tensors and nothing that they don't need."""
    copy = ModelProto()
    copy.CopyFrom(model)
    known = {value.name: value for value in model.graph.output}
    needed, kept = set(names), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            inside = [inner for body in bodies(node) for part in graphs(body) for inner in part.node]
            needed.update(name for inner in inside for name in inner.input)
    del copy.graph.node[:], copy.graph.output[:]
    copy.graph.node.extend(reversed(kept))
    copy.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    return copy


def has_free_batch(model: ModelProto) -> bool:
    """Whether the first dimension of every input and output is open, so that a batch may be cut into slices."""

    def free(value: onnx.ValueInfoProto) -> bool:
        dims = value.type.tensor_type.shape.dim
        return len(dims) > 0 and not dims[0].HasField("dim_value")

    return all(free(value) for value in (*model.graph.input, *model.graph.output))
