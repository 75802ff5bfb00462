"""Calibration batches, and the activations that a program computes on them.

Activations are read slice by slice: a slice is as many samples as fit `SLICE_BYTES`, if the program's batch is free, so
that memory does not grow with the calibration set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.errors import DataError, argument
from omgoptim.models.onnx_file import bodies, graphs
from omgoptim.techniques.quantize._onnx.program import as_technique_error, has_free_batch, open_program
from omgoptim.techniques.registry import ProgramRun

Batch = dict[str, NDArray[Any]]


def batches_for(model: ModelProto, run: ProgramRun, samples: int) -> list[Batch]:
    """Return the first `samples` calibration samples as batches of the model's inputs.

    Raises:
        DataError: there is none, an input is missing, or a value is NaN or infinite.
    """
    if not run.calibration:
        raise DataError(
            "static quantization needs calibration data",
            "the calibration split is empty, or no data was given",
            f"give {argument('data', 'file.py:callable')}, a callable that returns samples for split='calibration'; "
            "or use scheme dynamic, which needs no data",
        )
    names = [value.name for value in model.graph.input]
    batches: list[Batch] = []
    remaining = samples
    for given in run.calibration:
        missing = [name for name in names if name not in given]
        if missing:
            raise DataError(f"a calibration batch lacks the input '{missing[0]}'", f"it has {', '.join(sorted(given))}")
        batch = {name: np.asarray(given[name])[:remaining] for name in names}
        size = size_of(batch)
        if size == 0:
            continue
        for name, array in batch.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                kind = "NaN" if np.isnan(array).any() else "an infinite value"
                raise DataError(
                    f"the calibration data of input '{name}' contains {kind}",
                    "no quantization range can be calibrated from it",
                    "remove or fix these samples of the calibration split",
                )
        batches.append(batch)
        remaining -= size
        if remaining <= 0:
            break
    if not batches:
        raise DataError("static quantization needs calibration data", "every calibration batch is empty")
    return batches


def size_of(batch: Batch) -> int:
    """Return the number of samples in a batch: the length of its longest input; scalars are ignored."""
    return max((len(array) for array in batch.values() if array.ndim), default=0)


def subsample(batches: Sequence[Batch], samples: int, *, sliceable: bool = True) -> list[Batch]:
    """Take about `samples` samples, every n-th of each batch; batches that cannot be sliced are taken whole."""
    step = max(1, sum(map(size_of, batches)) // samples)
    cut = sliceable and all(
        array.ndim and len(array) == size_of(batch) for batch in batches for array in batch.values()
    )
    if not cut:
        return list(batches[::step])
    return [{name: array[::step] for name, array in batch.items()} for batch in batches]


def split(batches: Sequence[Batch], every: int = 4, *, sliceable: bool = True) -> tuple[list[Batch], list[Batch]]:
    """Split batches into a fitting and a held-out part: every `every`-th sample is held out.

    Args:
        batches: calibration inputs by name.
        every: every how many samples one is held out.
        sliceable: whether the program takes batches of any size; if not, whole batches are held out.

    Returns:
        Both, disjoint; the same batches twice if there is only one to give.
    """
    if sliceable and all(array.ndim and len(array) == size_of(batch) for batch in batches for array in batch.values()):
        fit: list[Batch] = []
        held_out: list[Batch] = []
        seen = 0
        for batch in batches:
            out = (np.arange(seen, seen + size_of(batch)) % every) == every - 1
            if seen == 0 and size_of(batch) and sum(map(size_of, batches)) in range(2, every):
                out[-1] = True  # fewer samples than a turn: the last of the first batch
            seen += size_of(batch)
            for rows, part in ((~out, fit), (out, held_out)):
                if rows.any():
                    part.append({name: array[rows] for name, array in batch.items()})
    else:
        held_out = list(batches[every - 1 :: every]) or list(batches[1:][-1:])
        fit = [batch for batch in batches if not any(batch is other for other in held_out)]
    return (fit, held_out) if fit and held_out else (list(batches), list(batches))


SLICE_BYTES = 2**28
"""Maximum bytes of captured tensors that are held at once, 256 MiB. Chosen by memory."""

Values = dict[str, NDArray[Any]]


def float_tensors(model: ModelProto) -> list[str]:
    """List the float32 inputs and activations of the main graph whose type is known."""
    known = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    names = [value.name for value in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return [name for name in dict.fromkeys(names) if known.get(name) == onnx.TensorProto.FLOAT]


class ActivationReader:
    """Session of a program that returns intermediate tensors.

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
        """Return the tensors for a batch."""
        found: Values = {}
        if self.session is not None:
            with as_technique_error("the program does not run on the calibration data"):
                found = dict(zip(self.computed, self.session.run(self.computed, batch), strict=True))
        return {name: np.asarray(found[name] if name in found else batch[name]) for name in self.names}

    def slices(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Values]]:
        """Yield every batch in slices, each with the tensors."""
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
    """Return the program's outputs, batch by batch."""
    reader = ActivationReader(model, threads=threads)
    return [reader.run(batch) for batch in batches]


def _only(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return a copy of the program that computes the named tensors only."""
    copy = deepcopy(model)
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
