"""Costs of a network in the final engine and precision, timed in turns with the original."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from omgoptim.architecture_search.runner import MeasuredCost
from omgoptim.errors import ModelError, OmgoptimError
from omgoptim.measure.measuring_process import ProcessPool
from omgoptim.measure.timing import PLANS, SCREENING_PLAN, Timing, time_artifacts
from omgoptim.models.manifest import Manifest
from omgoptim.models.recipe import Recipe
from omgoptim.operations.compression_job import Job
from omgoptim.operations.float_program import float_program
from omgoptim.operations.goal import Goal
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.save_module import save
from omgoptim.requests import SearchRequest
from omgoptim.requests.quantize import Static

CALIBRATION = 256
"""Samples that an int8 network is calibrated on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the costs; None without a target."""

    latency_ms: float | None
    size_bytes: float | None
    memory_bytes: float | None

    @staticmethod
    def of(request: SearchRequest, baseline_ms: float) -> Limits:
        """Return the limits of a request; a speedup is one of latency, by that of the original."""
        goal = Goal.of(request)
        latencies = [goal.latency_ms] if goal.latency_ms is not None else []
        latencies += [baseline_ms / request.target_speedup] if request.target_speedup is not None else []
        return Limits(min(latencies, default=None), goal.size_bytes, goal.memory_bytes)

    def loads(self, latency_ms: float | None, size_bytes: float | None, memory_bytes: float | None) -> dict[str, float]:
        """Return measured over allowed by constraint, of what is known and limited."""
        sides = {
            "latency": (latency_ms, self.latency_ms),
            "size": (size_bytes, self.size_bytes),
            "memory": (memory_bytes, self.memory_bytes),
        }
        return {
            name: value / limit for name, (value, limit) in sides.items() if value is not None and limit is not None
        }


@dataclass(frozen=True, slots=True)
class Costs:
    """Measures networks in turns with the original, so that the machine's load cancels out."""

    job: Job[SearchRequest]
    baseline: Path
    baseline_ms: float
    limits: Limits
    recipe: Recipe | None
    """Recipe of a network that is not a change of the model: an exported program."""
    pool: ProcessPool | None = None
    """Processes in which all networks are timed, one after the other."""

    def measure(self, module: nn.Module, folder: Path) -> MeasuredCost:
        """Save a network into a folder and measure it; one that was not trained is removed again.

        One that is larger than allowed is not timed.

        Raises:
            OmgoptimError: it cannot be saved, exported or opened.
        """
        untrained = folder.name != "artifact"
        self.save(module, folder, to_time_only=untrained)
        try:
            size = Manifest.read(folder).size_bytes
            if max(self.limits.loads(None, size, None).values(), default=0.0) > 1.0:
                return MeasuredCost(None, size, self.limits.loads(None, size, None))
            [found] = self.time_artifacts([folder])
        finally:
            if untrained:
                shutil.rmtree(folder, ignore_errors=True)
        if isinstance(found, OmgoptimError):
            raise found
        return found

    def time_artifacts(self, folders: Sequence[Path]) -> list[MeasuredCost | OmgoptimError]:
        """Time saved networks beside the original: on this machine all of them in one process, so that they compare."""
        sizes = [Manifest.read(folder).size_bytes for folder in folders]
        hold = self.job.context.measuring  # tasks go on until the network is open
        bench = replace(self.job.loaded.bench, hold=hold, pool=self.pool)
        launches = [folders] if bench.target is not None else [[folder] for folder in folders]
        timings = [
            timing
            for launch in launches
            for timing in time_artifacts([self.baseline, *launch], bench, SCREENING_PLAN, self.job.request.seed)[1:]
        ]
        return [
            self._cost(timing, size) if isinstance(timing, Timing) else timing
            for timing, size in zip(timings, sizes, strict=True)
        ]

    def save(self, module: nn.Module, folder: Path, *, to_time_only: bool) -> None:
        """Save a network as the artifact that would be delivered.

        Raises:
            OmgoptimError: it cannot be saved, exported or quantized.
        """
        job = self.job
        folder.parent.mkdir(parents=True, exist_ok=True)
        if job.request.precision == "float32":
            save(
                module,
                replace(job.loaded, recipe=self.recipe),
                job.runtime,
                folder,
                job.context,
                to_time_only=to_time_only,
            )
            return
        changed = replace(job.loaded, module=module, program=None)
        program = float_program(changed, job.context, "changed")
        if program.path is None:
            raise program.error or ModelError("the network has no program")
        calibration = changed.samples("calibration", CALIBRATION)
        shutil.rmtree(job.context.work / "candidates", ignore_errors=True)
        builder = CandidateBuilder(job.context, changed, program, calibration, job.request.seed)
        built = builder.build(CandidateSpec(Static(), job.runtime))
        if built.folder is None:
            raise built.error or ModelError("the network could not be quantized")
        os.replace(built.folder, folder)

    def _cost(self, timing: Timing, size_bytes: int) -> MeasuredCost:
        latency = self.baseline_ms / timing.speedup.value if timing.speedup else timing.latency_ms_p50
        return MeasuredCost(latency, size_bytes, self.limits.loads(latency, size_bytes, timing.peak_memory_bytes))


def costs_of(job: Job[SearchRequest], baseline: Path, recipe: Recipe | None, folder: Path, pool: ProcessPool) -> Costs:
    """Time the original once; a search that goes on keeps the time it began with."""
    file = folder / "original.json"
    if not file.exists():
        with job.context.measuring():
            [timing, _] = time_artifacts([baseline, baseline], job.loaded.bench, PLANS["quick"], job.request.seed)
        if isinstance(timing, OmgoptimError):
            raise timing
        scratch = file.with_suffix(".partial")
        scratch.write_text(json.dumps({"latency_ms": timing.latency_ms_p50}), encoding="utf-8")
        os.replace(scratch, file)
    baseline_ms = float(json.loads(file.read_text(encoding="utf-8"))["latency_ms"])
    return Costs(job, baseline, baseline_ms, Limits.of(job.request, baseline_ms), recipe, pool)
