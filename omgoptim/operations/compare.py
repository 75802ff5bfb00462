"""compare: measure two artifacts in alternation on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omgoptim.errors import ArtifactError, DataError, ModelError
from omgoptim.hardware import usable_cores
from omgoptim.measure.builtin_metrics import Metric, detect_outputs
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.metrics import RequestedFunction, resolve_metric
from omgoptim.measure.quality import Quality, StoredOutputs, compare_quality, read_outputs
from omgoptim.measure.validity_checks import batch_dependence, chance_level_summary
from omgoptim.models.artifact import open_session
from omgoptim.models.data import DataSource, open_data, random_data
from omgoptim.models.forward import name_inputs
from omgoptim.models.labels import predicts_next_token, shifted
from omgoptim.models.manifest import Manifest, read_json
from omgoptim.models.output_check import read_check
from omgoptim.models.outputs import ModelOutputs
from omgoptim.models.raw_batch import Collation
from omgoptim.models.samples import Samples, named_samples
from omgoptim.models.security.file_integrity import is_signed
from omgoptim.models.security.hub_options import allow_remote_code
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import find_artifact
from omgoptim.operations.context import RunContext, Stage, is_live
from omgoptim.operations.first_forward import NEXT_TOKEN_NOTE
from omgoptim.operations.gain_attribution import wait_removed_sentence
from omgoptim.operations.loaded_model import fixed_batch_note, float32_arrays
from omgoptim.operations.report_records import comparison, environment, output_records, shown_request
from omgoptim.operations.timing import bench_of, fraction_progress, full_race, slow_warnings
from omgoptim.operations.verdict import (
    is_gain,
    load_warnings,
    quality_sentence,
    quality_warnings,
    ruined_sentence,
    size_phrase,
    speed_phrase,
)
from omgoptim.reports import EfficiencyReport, Gains, Measurement
from omgoptim.requests import CompareRequest
from omgoptim.requests.command import command_of

RANDOM_SAMPLES = 256
"""Number of random samples without data, which is enough for an interval of their agreement."""

DECISION_GUARD = 0.01
"""Quality drop that the warnings on undecided drops refer to: the default guard of the other verbs."""


def compare(request: CompareRequest, context: RunContext) -> EfficiencyReport:
    """Measure B against A. See `CompareRequest`."""
    allow_remote_code(request.allow_remote_code)
    policy = PathPolicy.of_request(context.project, request)
    folders = [_artifact(name, policy) for name in (request.a, request.b)]
    manifests = [Manifest.read(folder) for folder in folders]
    lineage, device = common_lineage(*manifests), manifests[0].device
    past = _past_request(folders[0], context)
    data = _data(request, past, policy, folders[0])
    samples = _evaluation_samples(request, data, *manifests)
    threads = request.threads or usable_cores()
    samples, notes, free_batch = comparable_samples(folders, samples, threads, policy)
    if context.target is not None:
        threads = request.threads or context.target.machine.cores
    bench = bench_of(context, samples, request.batch if free_batch else None, threads, device, policy)
    inputs = samples.write(context.work / "eval")
    targets = [context.work / "outputs" / str(index) for index in range(2)]

    def outputs(index: int, process: MeasuringProcess) -> None:
        process.run_samples(inputs, targets[index], fraction_progress(context, f"evaluating {'AB'[index]}"))

    raced = full_race(folders, bench, request, Stage(context, "measuring in turns", (0.05, 0.98)), outputs)
    timing = raced.timing(1)  # raises the error if the evaluation of B failed
    original = read_outputs(targets[0])
    described, metric = _metric(request, past, manifests[0], original, samples.targets, policy)
    quality = compare_quality(metric, original, read_outputs(targets[1]), samples.targets, request.seed)
    before, after, gained = comparison(folders, (raced.timing(0), timing), bench, quality, samples.count, raced.load)
    chance = chance_level_summary(before.metric, before.quality, samples.targets)
    implausible = wait_removed_sentence(raced.timing(0), timing, raced.load, device, "A")
    warnings = [*([implausible] if implausible else []), *data.notes, *notes]
    warnings += quality_warnings(quality, DECISION_GUARD, data.real)
    warnings += [*load_warnings(raced.load), *slow_warnings(raced.timing(0), timing)]
    origin = "" if lineage else lineage_sentence(past, _past_request(folders[1], context))
    return EfficiencyReport(
        outcome="guard_failed" if quality.ruined else "ok" if is_gain(gained) else "no_gain",
        summary=f"{chance} {_verdict(before, gained, quality, implausible)}{origin}".strip(),
        warnings=warnings,
        verb="compare",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, bench, request.seed, device, raced.load),
        before=before,
        after=after,
        gains=gained,
        outputs=output_records(described, quality, timing),
        lineage=lineage,
        repeat=command_of("compare", request),
    )


def _evaluation_samples(request: CompareRequest, data: DataSource, a: Manifest, b: Manifest) -> Samples:
    """Return the samples for both artifacts, which must take the same inputs."""
    names = a.signature.input_names
    if names != b.signature.input_names:
        raise ModelError(
            "the two artifacts take different inputs", f"A takes {names}, B takes {b.signature.input_names}"
        )
    raw = data.evaluation(request.samples if data.real else RANDOM_SAMPLES)
    samples = named_samples([name_inputs(None, item.inputs, names) for item in raw], raw)
    if any(tensor.dtype == "float32" for manifest in (a, b) for tensor in manifest.signature.inputs):
        samples = float32_arrays(samples)  # programs take no other; a module of another precision converts them
    return samples


def _verdict(before: Measurement, gained: Gains, quality: Quality, implausible: str) -> str:
    doubts = f"{ruined_sentence(quality.ruined)} " if quality.ruined else ""
    doubts += f"{implausible}. " if implausible else ""
    return f"{doubts}B against A: {size_phrase(gained)}, {speed_phrase(gained)}. {quality_sentence(before, quality)}"


def _metric(
    request: CompareRequest,
    past: Mapping[str, Any],
    manifest: Manifest,
    original: StoredOutputs,
    targets: list[Any],
    policy: PathPolicy,
) -> tuple[ModelOutputs, Metric]:
    """Return the description of A's outputs, and the metric of the request or of A's run."""
    name = request.metric or str(past.get("metric", "auto"))
    ignored = past.get("ignore_outputs", [])
    described = detect_outputs(original, targets, name, manifest.signature, past.get("target_output"), ignored)
    requested = RequestedFunction(name, policy, request.time_limit_s, described)
    return described, resolve_metric(requested, manifest.signature, original, targets)


def comparable_samples(
    folders: Sequence[Path], samples: Samples, threads: int, policy: PathPolicy
) -> tuple[Samples, list[str], bool]:
    """Return samples that suit both artifacts, notes on them, and whether batches above 1 can be timed.

    The targets of a causal language model become the next tokens; the batch size is 1 where an output depends
    on its batch, or where one of the artifacts accepts only that.
    """
    notes: list[str] = []
    dependent = None
    batch_sizes = {name: Manifest.read(folder).signature.batch for name, folder in zip("AB", folders, strict=True)}
    fixed = [name for name, size in batch_sizes.items() if size]
    if fixed:
        samples = samples.one_by_one()
        notes.append(fixed_batch_note(f"the batch of {' and '.join(fixed)} is fixed at 1"))
    for name, folder in zip("AB", folders, strict=True):
        manifest, session = open_session(folder, threads, policy)
        if name == "A" and predicts_next_token(samples.batches[0], samples.targets[0], session.run):
            samples = Samples(samples.batches, [shifted(target) for target in samples.targets])
            notes.append(NEXT_TOKEN_NOTE)
        found = batch_dependence(session.run, samples, coarse=manifest.precision != "float32")
        if found and not dependent:
            dependent = found
            notes.append(f"{name}: {found}; quality is measured at batch 1, and throughput is not measured")
    return samples.one_by_one() if dependent else samples, notes, not (dependent or fixed)


def _artifact(name: str, policy: PathPolicy) -> Path:
    folder = find_artifact(name, policy)
    if folder is None:
        raise ArtifactError(
            f"'{name}' is not an artifact",
            "it is neither a run of this project nor an artifact folder",
            "omgoptim runs list",
        )
    return folder


def common_lineage(a: Manifest, b: Manifest) -> list[str]:
    """Return the common runs of both, then the further ones of B, oldest first; empty where none is common."""
    if not set(a.lineage) & set(b.lineage):
        return []
    shared = [run for run in a.lineage if run in b.lineage]
    return [*shared, *(run for run in b.lineage if run not in shared)]


def lineage_sentence(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Return a sentence on the origin of two artifacts without a common run, by their requests."""
    origins = [[past.get(name) for name in ("model", "checkpoint", "model_kwargs")] for past in (a, b)]
    if any(is_live(origin[0]) for origin in origins):
        return ""
    if origins[0][0] and origins[0] == origins[1]:
        return f" Both were made from {origins[0][0]}."
    return " A and B descend from no common run."


def _past_request(folder: Path, context: RunContext) -> dict[str, Any]:
    """Return the request of an artifact's run; empty unless it is a signed run of this project."""
    if folder.parent.parent.resolve() != context.folder.parent.resolve():
        return {}
    try:
        record = read_json(folder.parent / "request.json")
        own = is_signed("request", record) and record["run"] == folder.parent.name
        return dict(record["request"]) if own else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _data(request: CompareRequest, past: dict[str, Any], policy: PathPolicy, folder: Path) -> DataSource:
    manifest = Manifest.read(folder)
    spec = request.data or past.get("data")
    if is_live(spec) or (is_live(past.get("metric")) and not request.metric):
        raise DataError(
            "run A was measured with Python objects",
            "another run cannot use its data or metric",
            "give data and metric as a source: file.py:callable",
        )
    if spec:
        ranks = [len(tensor.shape) for tensor in manifest.signature.inputs]
        collation = Collation(None, ranks)
        return open_data(str(spec), policy, request.batch, request.time_limit_s, request.seed, collation)
    recorded = read_check(folder).batch  # sizes of its data, where the signature has dynamic dimensions
    shapes = past.get("inputs") or [
        f"{t.name}:{t.dtype}:{'x'.join(map(str, (1, *recorded[t.name].shape[1:])))}" for t in manifest.signature.inputs
    ]
    return random_data([str(shape) for shape in shapes], None, 64, request.seed)
