"""profile: one artifact, measured as it is; and what that says about what is worth trying."""

from __future__ import annotations

from omgoptim.errors import OmgoptimError
from omgoptim.measure.chance import chance_words
from omgoptim.measure.launch import Process
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.program_layers import ask_layers
from omgoptim.measure.quality import read_outputs, score
from omgoptim.measure.race import LATENCY
from omgoptim.models.artifact import Manifest
from omgoptim.models.samples import of_size
from omgoptim.operations.advice import profile_steps, repeat_of
from omgoptim.operations.attribution import waiting_share, waiting_words
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.context import RunContext
from omgoptim.operations.fixed_batch import at_batch_one
from omgoptim.operations.making import float_program
from omgoptim.operations.measured import environment, measurement, output_records, shown_request
from omgoptim.operations.subject import Live, Subject, prepare
from omgoptim.operations.timing import full_race, told
from omgoptim.operations.verdict import load_warnings
from omgoptim.reports import EfficiencyReport, Layer, Measurement
from omgoptim.requests import ProfileRequest
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.torch_precision import HALF


def profile(request: ProfileRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Measure a model as it is. See `ProfileRequest`."""
    subject = prepare(request, context, live)
    program = None
    if request.runtime != "auto" and ENGINES[request.runtime].runs == "program" and subject.precision == "float32":
        program = float_program(subject, context, or_at_one=True)
        if program.fixed_batch is not None:
            subject = at_batch_one(subject, program.fixed_batch, context.work)
    folder = baseline_on(request.runtime, subject, context, program)
    layers: list[Layer] = []
    untold: list[str] = []

    def more(_: int, process: Process) -> None:
        process.run_samples(subject.eval_folder, context.work / "outputs", told(context, "evaluating the model"))
        if subject.module is not None and subject.precision in HALF:
            untold.append(f"layers are not timed in {subject.precision}")
            return
        context.progress("timing the layers", None)
        by_path = subject.macs.by_path if subject.macs else {}
        try:
            layers.extend(ask_layers(process, LATENCY, of_size(subject.evaluation, 1), by_path, top=10))
        except OmgoptimError as error:  # the rest of the profile stands without them
            untold.append(f"the layers could not be timed: {error.what}. {error.why}")
        if not layers and not untold:
            untold.append(f"{Manifest.read(folder).runtime} does not tell how long its layers take on this device")

    raced = full_race([folder], subject.bench, request.timing, request.seed, context, (0.2, 0.95), "measuring", more)
    timing = raced.timing(0)
    quality, metric_name = _quality(request, subject, context)
    before = measurement(
        folder, timing, subject.bench, quality, metric_name, subject.evaluation.count if metric_name else None
    )
    doubt = chance_words(metric_name, quality, subject.evaluation.targets)
    if before.macs is None and subject.macs and subject.macs.macs is not None:  # an artifact that does not say
        before = before.model_copy(update={"macs": subject.macs.macs, "flops": 2 * subject.macs.macs})
    waits = waiting_share(timing, raced.load) if subject.device == "cpu" else None
    warnings = [*subject.notes, *untold, *load_warnings(raced.load)]
    if waits is not None:
        warnings.insert(0, waiting_words(waits))
    if before.macs is None:
        warnings.append("multiply-accumulates were not counted: the run's log says why")
    return EfficiencyReport(
        outcome="ok",
        summary=" ".join(part for part in (doubt, _summary(request.model, before)) if part),
        warnings=warnings,
        next_steps=profile_steps(request, subject, layers, waits),
        verb="profile",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, subject.bench, request.seed, subject.device, raced.load),
        before=before,
        outputs=output_records(subject.outputs, timing=timing),
        layers=layers,
        macs_check=subject.macs.check if subject.macs else None,
        lineage=list(subject.lineage[:-1]),
        repeat=repeat_of("profile", request),
    )


def _quality(request: ProfileRequest, subject: Subject, context: RunContext) -> tuple[float | None, str | None]:
    """The model's quality where the data has targets; agreement with itself would say nothing."""
    outputs = read_outputs(context.work / "outputs")
    targets = subject.evaluation.targets
    name = subject.metric
    if targets[0] is None and name == "auto":
        return None, None
    metric = resolve_metric(
        name, subject.signature, outputs, targets, subject.reach, request.time_limit_s, subject.outputs
    )
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
