"""profile: measure a model unchanged, with its layers."""

from __future__ import annotations

from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.measure.engine_profile import query_layers
from omgoptim.measure.launch import LATENCY
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.quality import read_outputs, score
from omgoptim.measure.validity_checks import chance_level_summary
from omgoptim.models.manifest import Manifest
from omgoptim.models.samples import repeat_to_size
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.context import RunContext, Stage
from omgoptim.operations.float_program import float_program
from omgoptim.operations.gain_attribution import waiting_sentence, waiting_share
from omgoptim.operations.loaded_model import Live, LoadedModel, at_batch_one
from omgoptim.operations.next_steps import profile_steps, repeat_of
from omgoptim.operations.prepare import prepare
from omgoptim.operations.reference_outputs import metric_of
from omgoptim.operations.report_records import environment, measurement, output_records, shown_request
from omgoptim.operations.timing import fraction_progress, full_race, slow_warnings
from omgoptim.operations.verdict import load_warnings
from omgoptim.reports import EfficiencyReport, Layer, Measurement
from omgoptim.requests import ProfileRequest
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.executorch import ONE_SAMPLE
from omgoptim.runtimes.torch_precision import HALF


def profile(request: ProfileRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Measure a model unchanged. See `ProfileRequest`."""
    loaded = prepare(request, context, live)
    loaded, folder = _on_engine(request.runtime, loaded, context)
    layers: list[Layer] = []
    unknown: list[str] = []

    def more(_: int, process: MeasuringProcess) -> None:
        layers.clear()  # a launch that a lost connection cut is done again
        unknown.clear()
        process.run_samples(
            loaded.eval_folder, context.work / "outputs", fraction_progress(context, "evaluating the model")
        )
        context.progress("timing the layers", None)
        found, problem = _timed_layers(process, loaded, folder)
        layers.extend(found)
        unknown.extend([problem] if problem else [])

    raced = full_race([folder], loaded.bench, request, Stage(context, "measuring", (0.2, 0.95)), more)
    timing = raced.timing(0)
    quality, metric_name = _quality(request, loaded, context)
    samples = loaded.evaluation.count if metric_name else None
    before = measurement(folder, timing, loaded.bench, quality, metric_name, samples)
    chance = chance_level_summary(metric_name, quality, loaded.evaluation.targets)
    if before.macs is None and loaded.macs and loaded.macs.macs is not None:  # an artifact without a count
        before = before.model_copy(update={"macs": loaded.macs.macs, "flops": 2 * loaded.macs.macs})
    waits = waiting_share(timing, raced.load, loaded.device)
    warnings = [
        *([waiting_sentence(waits)] if waits is not None else []),
        *loaded.notes,
        *unknown,
        *load_warnings(raced.load),
        *slow_warnings(timing),
        *(["multiply-accumulates were not counted: the run's log says why"] if before.macs is None else []),
    ]
    return EfficiencyReport(
        outcome="ok",
        summary=" ".join(part for part in (chance, _summary(request.model, before)) if part),
        warnings=warnings,
        next_steps=profile_steps(request, loaded, layers, waits),
        verb="profile",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, raced.load),
        before=before,
        outputs=output_records(loaded.outputs, timing=timing),
        layers=layers,
        macs_check=loaded.macs.check if loaded.macs else None,
        lineage=list(loaded.lineage[:-1]),
        repeat=repeat_of(request),
    )


def _on_engine(runtime: str, loaded: LoadedModel, context: RunContext) -> tuple[LoadedModel, Path]:
    """Return the model as the engine takes it, and its artifact there."""
    program = None
    if runtime != "auto" and ENGINES[runtime].runs == "program" and loaded.precision == "float32":
        program = float_program(loaded, context, or_at_one=True)
        if program.fixed_batch is not None:
            loaded = at_batch_one(loaded, program.fixed_batch, context.work)
    elif runtime != "auto" and ENGINES[runtime].runs == "lowered":
        loaded = at_batch_one(loaded, ONE_SAMPLE, context.work, lowered=True)
    return loaded, baseline_on(runtime, loaded, context, program)


def _timed_layers(process: MeasuringProcess, loaded: LoadedModel, folder: Path) -> tuple[list[Layer], str | None]:
    """Return the costliest layers of an artifact with their times, or the reason why they are unknown."""
    if loaded.module is not None and loaded.precision in HALF:
        return [], f"layers are not timed in {loaded.precision}"
    by_path = loaded.macs.by_path if loaded.macs else {}
    try:
        layers = query_layers(process, LATENCY, repeat_to_size(loaded.evaluation, 1), by_path, top=10)
    except OmgoptimError as error:  # the rest of the profile is valid without them
        return [], f"the layers could not be timed: {error.reason}"
    silent = f"{Manifest.read(folder).runtime} does not report times per layer on this device"
    return layers, None if layers else silent


def _quality(request: ProfileRequest, loaded: LoadedModel, context: RunContext) -> tuple[float | None, str | None]:
    """Return the quality where the data has targets; agreement with itself is meaningless."""
    outputs = read_outputs(context.work / "outputs")
    targets = loaded.evaluation.targets
    if targets[0] is None and loaded.metric == "auto":
        return None, None
    metric = metric_of(loaded, outputs, targets, request.time_limit_s)
    if metric.agreement:
        return None, None
    return score(metric, outputs, targets, outputs), metric.name


def _summary(model: str, measured: Measurement) -> str:
    facts = {
        "{:.3g} ms at batch 1": measured.latency_ms_p50,
        "{:.3g} MB on disk": measured.size_bytes and measured.size_bytes / 1e6,
        "{:,} parameters": measured.params,
        "{:,.4g} M multiply-accumulates": measured.macs and measured.macs / 1e6,
    }
    summary = f"{model}: {', '.join(text.format(value) for text, value in facts.items() if value)}."
    if measured.metric and measured.quality is not None:
        summary += f" {measured.metric.replace('_', ' ')} {measured.quality:.4f} on {measured.samples} samples."
    return summary
