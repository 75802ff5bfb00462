"""Records of a report from timings, outputs and artifacts."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import omgoptim
from omgoptim.hardware import cpu_features, cpu_name
from omgoptim.measure.measuring_process import TimingSetup
from omgoptim.measure.quality import Quality
from omgoptim.measure.timing import Timing
from omgoptim.models.artifact import loading_snippet
from omgoptim.models.manifest import MANIFEST, Manifest
from omgoptim.models.outputs import ModelOutputs
from omgoptim.operations.context import RunContext, is_live
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Artifact, Environment, Gains, Measurement, OutputRecord, TargetMachine
from omgoptim.requests import CompareRequest, ModelRequest, Request, technique_field, verb_of
from omgoptim.requests.command import command_of, technique_arguments

if TYPE_CHECKING:
    from omgoptim.measure.target.client import Target

VERSIONS = ("torch", "onnxruntime", "openvino", "nncf", "onnx", "numpy")
"""Packages whose versions a report lists."""


def measurement_record(
    folder: Path, timing: Timing, bench: TimingSetup, quality: float | None, metric: str | None, samples: int | None
) -> Measurement:
    """Return the measurement of one artifact."""
    manifest = Manifest.read(folder)
    return Measurement(
        runtime=manifest.runtime,
        measured_on=str(bench.target.address) if bench.target else None,
        precision=manifest.precision,
        size_bytes=manifest.size_bytes,
        size_files=manifest.size_files,
        dense_size_bytes=manifest.dense_size_bytes,
        params=manifest.params,
        nonzero_params=manifest.nonzero_params,
        macs=manifest.macs,
        flops=None if manifest.macs is None else 2 * manifest.macs,
        latency_ms_p50=timing.latency_ms_p50,
        latency_ms_p90=timing.latency_ms_p90,
        throughput_per_s=timing.throughput_per_s,
        batch=bench.batch,
        peak_memory_bytes=timing.peak_memory_bytes,
        quality=quality,
        metric=metric,
        samples=samples,
    )


def gains_record(
    before: Measurement, after: Measurement, timing: Timing, quality: Quality | None, load: float
) -> Gains:
    """Return the gains of `after` over `before`; without speedup on an overloaded machine."""
    trusted = load <= OVERLOADED
    speedup = timing.speedup if trusted else None
    return Gains(
        size_ratio=ratio_of(before.size_bytes, after.size_bytes),
        speedup=speedup.value if speedup else None,
        speedup_low=speedup.low if speedup else None,
        speedup_high=speedup.high if speedup else None,
        throughput_ratio=timing.throughput_ratio if trusted else None,
        memory_ratio=ratio_of(before.peak_memory_bytes, after.peak_memory_bytes),
        macs_ratio=ratio_of(before.macs, after.macs),
        quality_drop=quality.drop if quality else None,
        quality_drop_low=finite(quality.low) if quality else None,
        quality_drop_high=finite(quality.high) if quality else None,
        agreement=finite(quality.agreement) if quality else None,
        launches=timing.launches,
    )


def comparison_records(
    folders: Sequence[Path], timings: Sequence[Timing], bench: TimingSetup, quality: Quality, samples: int, load: float
) -> tuple[Measurement, Measurement, Gains]:
    """Return the measurements of an original and an artifact, and the gains of the second over the first."""
    before = measurement_record(folders[0], timings[0], bench, quality.before, quality.metric, samples)
    after = measurement_record(folders[1], timings[1], bench, quality.after, quality.metric, samples)
    return before, after, gains_record(before, after, timings[1], quality, load)


def output_records(
    outputs: ModelOutputs, quality: Quality | None = None, timing: Timing | None = None
) -> list[OutputRecord]:
    """Return the records of a model's outputs, with their agreement where measured.

    Args:
        outputs: description of each output.
        quality: agreement of each output; None where nothing was evaluated.
        timing: timing of the report's artifact, with the outputs of fresh processes for its recorded samples.
    """
    reopened = timing.reopened if timing else ()
    measured = {found.spec.index: found for found in quality.outputs} if quality else {}
    records = []
    for spec in outputs.specs:
        found = measured.get(spec.index)
        records.append(
            OutputRecord(
                name=spec.name,
                shape=list(spec.shape),
                dtype=spec.dtype,
                kind=spec.kind,
                evidence=spec.evidence,
                compared_by=spec.compared_by,
                weight=spec.weight,
                labelled=spec.index == outputs.target,
                agreement=None if found is None else max(found.agreement, 0.0),
                relative_error=None if found is None or found.relative_error is None else finite(found.relative_error),
                cosine=None if found is None else found.cosine,
                ruined=found is not None and found.ruined,
                reopened=reopened[spec.index] if spec.index < len(reopened) else None,
            )
        )
    return records


def ratio_of(before: int | None, after: int | None) -> float | None:
    """Return before / after; None where one of them is unknown or 0."""
    return before / after if before and after else None


def finite(value: float) -> float | None:
    """Return a finite number; None for infinity and NaN."""
    return value if math.isfinite(value) else None


def package_versions() -> dict[str, str]:
    """Return the versions of omgoptim and of the installed packages of `VERSIONS`."""
    versions = {"omgoptim": omgoptim.__version__}
    for name in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def environment_record(
    context: RunContext, bench: TimingSetup, seed: int, device: str, load: float | None
) -> Environment:
    """Return the record of machine and versions."""
    versions = {"omgoptim": omgoptim.__version__, "python": platform.python_version()} | package_versions()
    return Environment(
        cpu=cpu_name(),
        cpu_features=cpu_features(),
        gpu=_gpu_name() if device == "cuda" else None,
        device=device,
        threads=bench.threads,
        python=f"{context.python} ({context.found_by})",
        versions=versions,
        seed=seed,
        load=load,
        target=_target_machine(bench.target) if bench.target else None,
    )


def _target_machine(target: Target) -> TargetMachine:
    machine = target.machine
    return TargetMachine(
        address=str(target.address),
        cpu=machine.cpu,
        cpu_features=list(machine.cpu_features),
        cores=machine.cores,
        memory_bytes=machine.memory_bytes,
        system=machine.uname,
        python=f"{machine.python} {machine.python_version}",
        versions=machine.versions,
    )


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def artifact_record(folder: Path) -> Artifact:
    """Return the record of a saved artifact."""
    manifest = Manifest.read(folder)
    files = {name: (folder / name).stat().st_size for name in sorted((*manifest.files, MANIFEST))}  # no card of a step
    return Artifact(path=str(folder), files=files, load=loading_snippet(folder, manifest))


def request_record(verb_request: Any) -> dict[str, Any]:
    """Return the resolved request as plain data."""
    return dict(verb_request.model_dump(mode="json"))


def repeat_command(request: Request) -> str:
    """Return the command of a request; a Python call where it has Python objects."""
    verb, given = verb_of(request), request.model_dump(exclude_defaults=True)
    key = technique_field(type(request))
    if key in given:
        given.pop(key)
        given.update(technique_arguments(request))
    live = {name for name, value in given.items() if is_live(value)}
    if not live:
        return command_of(verb, request)
    keywords = [f"{name}={name if name in live else repr(value)}" for name, value in given.items() if name != "model"]
    model = "model" if "model" in live else repr(given["model"])
    return f"omgoptim.{verb}({', '.join([model, *keywords])})"


def report_head(
    request: ModelRequest | CompareRequest, context: RunContext, bench: TimingSetup, device: str, load: float | None
) -> dict[str, Any]:
    """Return the fields of every report: verb, run, request, environment, and the command that repeats the run."""
    return {
        "verb": verb_of(request),
        "run_id": context.run_id,
        "request": request_record(request),
        "environment": environment_record(context, bench, request.seed, device, load),
        "repeat": repeat_command(request),
    }
