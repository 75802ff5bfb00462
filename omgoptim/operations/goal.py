"""Goal of a run: the quality guard, targets for latency, size and memory, and lower bounds of what can be reached."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from omgoptim.errors import OmgoptimError, RequestError
from omgoptim.measure.timing import PLANS, Timing, time_artifacts
from omgoptim.models.artifact import save_program
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Measurement
from omgoptim.requests import OptimizeRequest, PruneRequest, SearchRequest
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.signature import Signature

MB = 1_000_000
"""Bytes of a megabyte: decimal, as in all reports."""


def time_target(request: object) -> str | None:
    """Return a request's target for latency or speedup in words; None without one."""
    holder = request.method if isinstance(request, PruneRequest) else request
    latency_ms: float | None = getattr(holder, "target_latency_ms", None)
    speedup: float | None = getattr(holder, "target_speedup", None)
    if latency_ms is not None:
        return f"a latency of {latency_ms:g} ms"
    return f"a speedup of {speedup:g}x" if speedup is not None else None


@dataclass(frozen=True, slots=True)
class Missed:
    """A target that a measurement does not reach."""

    name: str
    measured: float
    target: float
    unit: str

    @property
    def factor(self) -> float:
        """Measured over target, above 1."""
        return self.measured / self.target

    def __str__(self) -> str:
        return f"{self.name} {self.measured:.3g} {self.unit}, target {self.target:.3g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Goal:
    """Quality guard and targets of a run; None without a target."""

    max_quality_drop: float
    latency_ms: float | None = None
    size_bytes: float | None = None
    memory_bytes: float | None = None

    @staticmethod
    def of(request: OptimizeRequest | SearchRequest) -> Goal:
        """Return the goal of a request."""
        size, memory = request.target_size_mb, request.target_memory_mb
        return Goal(
            request.max_quality_drop,
            request.target_latency_ms,
            None if size is None else size * MB,
            None if memory is None else memory * MB,
        )

    def missed(self, measured: Measurement, load: float) -> list[Missed]:
        """Return the targets that a measurement does not reach, the furthest first.

        What is not known is not missed; the latency is not known where the machine was overloaded.

        Args:
            measured: size, latency and memory of an artifact.
            load: share of the machine that other processes used while it was timed.
        """
        latency_ms = measured.latency_ms_p50 if load <= OVERLOADED else None
        sides = (
            ("latency", latency_ms, self.latency_ms, 1.0, "ms"),
            ("size", measured.size_bytes, self.size_bytes, MB, "MB"),
            ("peak memory", measured.peak_memory_bytes, self.memory_bytes, MB, "MB"),
        )
        missed = [
            Missed(name, value / scale, target / scale, unit)
            for name, value, target, scale, unit in sides
            if value is not None and target is not None and value > target
        ]
        return sorted(missed, key=lambda one: -one.factor)


MARGIN = 1.2
"""Factor over the lower bound of a suggested target: the model's own work is added to the bound. Chosen: a target at
the bound itself cannot be reached."""


MIN_BITS = 4
"""Bits of a parameter in the smallest format there is. That is int4."""


@dataclass(frozen=True, slots=True)
class LowerBound:
    """Cost of an identity graph on one engine."""

    runtime: str
    latency_ms: float
    memory_bytes: int | None
    size_bytes: int


def measure_lower_bounds(loaded: LoadedModel, context: RunContext, runtime: str) -> tuple[list[LowerBound], float]:
    """Time an empty graph with the model's inputs on every engine that may be used; none where no program engine is.

    Returns:
        The bounds; and the seconds that one launch took, without the wait for the device.
    """
    names = [
        name
        for name, engine in ENGINES.items()
        if engine.runs == "program" and runtime in ("auto", name) and not engine.missing(loaded.device)
    ]
    folders = []
    for name in names:
        folder = context.work / "bounds" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        _save_identity_graph(folder, name, loaded)
        folders.append(folder)
    if not folders:
        return [], 0.0
    context.progress("measuring an empty graph, the lower bound", 0.03)
    with context.measuring():
        began = time.monotonic()
        timings = time_artifacts(folders, loaded.bench, PLANS["quick"], 0)
        launch_s = (time.monotonic() - began) / len(folders)
    bounds = [
        LowerBound(name, timing.latency_ms_p50, timing.peak_memory_bytes, Manifest.read(folder).size_bytes)
        for name, folder, timing in zip(names, folders, timings, strict=True)
        if isinstance(timing, Timing)
    ]
    return bounds, launch_s


def refuse_below_bounds(goal: Goal, bounds: Sequence[LowerBound]) -> None:
    """Refuse a target that not even an empty graph reaches.

    Raises:
        RequestError: with the nearest target that is not ruled out.
    """
    if not bounds:
        return
    fastest = min(bounds, key=lambda bound: bound.latency_ms)
    if goal.latency_ms is not None and goal.latency_ms < fastest.latency_ms:
        least = fastest.latency_ms * MARGIN
        raise RequestError(
            f"no model reaches {goal.latency_ms:g} ms on this machine",
            f"an empty graph with these inputs takes {fastest.latency_ms:.3g} ms on {fastest.runtime}, the fastest",
            f"give a latency target of at least {least:.3g} ms",
        )
    known = [bound for bound in bounds if bound.memory_bytes]
    if goal.memory_bytes is not None and known:
        lightest = min(known, key=lambda bound: bound.memory_bytes or 0)
        least_bytes = lightest.memory_bytes or 0
        if goal.memory_bytes < least_bytes:
            raise RequestError(
                f"no model runs within {goal.memory_bytes / MB:g} MB on these engines",
                f"a process of {lightest.runtime} with an empty graph takes {least_bytes / MB:.0f} MB",
                f"give a memory target of at least {MARGIN * least_bytes / MB:.0f} MB",
            )
    smallest = min(bound.size_bytes for bound in bounds)
    if goal.size_bytes is not None and goal.size_bytes < smallest:
        raise RequestError(
            f"no model fits into {goal.size_bytes / MB:g} MB",
            f"a file with an empty graph takes {smallest:,} bytes",
            f"give a size target of at least {MARGIN * smallest / MB:.3g} MB",
        )


def refuse_unreachable_size(goal: Goal, loaded: LoadedModel, problem: str | None) -> None:
    """Refuse a size that no number format reaches, where the number of parameters cannot change.

    `problem` says why nothing can be trained, and so nothing pruned or distilled; None where it can.

    Raises:
        RequestError: with the nearest size that is not ruled out.
    """
    if goal.size_bytes is None or problem is None or loaded.params is None:
        return
    least = loaded.params[0] * MIN_BITS / 8
    if goal.size_bytes < least:
        raise RequestError(
            f"the model does not fit into {goal.size_bytes / MB:g} MB",
            f"{loaded.params[0]:,} parameters in {MIN_BITS} bits each are {least / MB:.3g} MB; {problem}",
            f"give a size target of at least {MARGIN * least / MB:.3g} MB, or training data",
        )


def _save_identity_graph(folder: Path, runtime: str, loaded: LoadedModel) -> None:
    """Save a program that returns its first input and reads no other."""
    path = folder.with_suffix(".onnx")
    inputs = loaded.signature.inputs
    kinds = [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(_numpy(tensor.dtype))) for tensor in inputs]
    values = [
        onnx.helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))
        for tensor, kind in zip(inputs, kinds, strict=True)
    ]
    given = onnx.helper.make_tensor_value_info("given", kinds[0], list(inputs[0].shape))
    node = onnx.helper.make_node("Identity", [inputs[0].name], ["given"])
    graph = onnx.helper.make_graph([node], "empty", values, [given])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, path)
    signature = Signature(inputs, "tensor")
    batch = {tensor.name: loaded.example[tensor.name] for tensor in inputs}
    save_program(folder, path, Manifest(runtime, "float32", signature), OutputCheck(batch, [batch[inputs[0].name]]))


def _numpy(dtype: str) -> str:
    if dtype == "bfloat16":
        raise OmgoptimError("no lower bound can be measured with an input in bfloat16")
    return dtype
