"""Dry runs: what a verb would build or change and how much training it would take; nothing is trained or measured."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence

import torch

from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params
from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import find_layers, select_layers
from omgoptim.operations.compression_job import WORK_SPAN, AnyJob, Job, apply_technique
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import one_sample
from omgoptim.operations.distillation.student import Student, derive_student, load_student
from omgoptim.operations.distillation.student_search import derive_students, planned_record
from omgoptim.operations.final_measurement import Compression
from omgoptim.operations.float_program import Program
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.next_steps import plan_step
from omgoptim.operations.quantization.candidates import CandidatePlan
from omgoptim.operations.report_records import report_head
from omgoptim.operations.rounds.loop import RoundsJob
from omgoptim.reports import Candidate, Change, EfficiencyReport, Round
from omgoptim.requests import DistillRequest, Params, QuantizeRequest, verb_of
from omgoptim.requests.distill import Auto, Given
from omgoptim.requests.quantize import Bf16, Dynamic, Fp16, Qat, Static, WeightOnly
from omgoptim.techniques.registry import Outcome
from omgoptim.text import plural
from omgoptim.training.config import MIN_STEPS_PER_EPOCH, TrainingConfig, config_for_data
from omgoptim.training.loop import Objective

INT8_OPS: dict[type[Params], tuple[str, ...]] = {
    Static: ("Conv", "ConvTranspose", "MatMul", "Gemm"),
    Qat: ("Conv", "ConvTranspose", "MatMul", "Gemm"),
    Dynamic: ("MatMul", "Gemm", "LSTM", "GRU", "RNN"),
    WeightOnly: ("MatMul", "Gemm", "LSTM", "GRU", "RNN"),
}
"""Operators that each technique quantizes."""

OPEN_S = 4.1
"""Seconds in which a torch process (3.5) and one of ONNX Runtime (0.6) open an artifact; measured once on two cores."""

MAX_BATCHES = 100_000
"""Maximum number of batches of an epoch that are counted, since data may be endless."""


def plan_quantize(
    request: QuantizeRequest, context: RunContext, loaded: LoadedModel, program: Program, plan: CandidatePlan
) -> EfficiencyReport:
    """Report planned candidates, affected layers, and estimates of time and size."""
    launches = {"quick": 1, "standard": 5, "careful": 12}[request.timing]
    samples = loaded.evaluation.count + getattr(request.scheme, "calibration_samples", 0) + 256
    build_s = 2 * samples * _seconds_per_sample(loaded) + 3.0
    seconds = len(plan.specs) * build_s + launches * (OPEN_S + 4.0)
    why = "to be built and screened, and measured in full if among the best; the size is an estimate"
    candidates = [spec.record("planned", why, size_bytes=_estimated_bytes(spec.params, program)) for spec in plan.specs]
    changed = _planned_changes(plan, program)
    training = ""
    if isinstance(request.scheme, Qat):
        training = f" after {plural(request.scheme.epochs, 'epoch')} of training, which the estimate excludes"
    summary = (
        f"Dry run: {plural(len(candidates), 'candidate')} would be built for {plural(len(changed), 'layer')}, "
        f"in about {max(10, round(seconds, -1)):.0f} s{training}."
    )
    report = dry_run_report(request, context, loaded, summary)
    return report.model_copy(update={"changed": changed, "candidates": [*candidates, *plan.skipped]})


def plan_rounds(job: RoundsJob, steps: Sequence[Params]) -> EfficiencyReport:
    """Report the changes of the last round of prune or factorize, and the amount of training.

    Raises:
        OmgoptimError: the technique does not support the model.
    """
    job.context.progress("applying the technique to a copy", WORK_SPAN[0])
    module = copy.deepcopy(job.original)
    outcome = apply_technique(job, module, steps[-1], job.module_run())
    args, kwargs = one_sample(job.loaded)
    params, nonzero = count_params(module)
    last = Round(number=len(steps), params=params, nonzero_params=nonzero, macs=count_macs(module, args, kwargs).macs)
    layers = len({change.path for change in outcome.changed})
    summary = (
        f"Dry run: {verb_of(job.request)} would change {plural(layers, 'layer')} in {plural(len(steps), 'round')}, "
        f"to {params:,} parameters ({nonzero:,} nonzero){_rounds_training(job, len(steps))}. "
        f"{' '.join(outcome.notes)} Quality and speed are unknown."
    )
    return _job_report(job, summary, outcome, [last])


def plan_distill(job: Job[DistillRequest], live: Live) -> EfficiencyReport:
    """Report the student or student candidates, and the amount of training.

    Raises:
        OmgoptimError: no student can be derived or loaded.
    """
    request, params = job.request, job.loaded.params
    student, candidates = _planned_student(job, live)
    if student is not None:
        rounds = [Round(number=1, params=student.params, macs=student.macs)]
        text = f"the student would be {student.name}, with {student.params:,} parameters"
    else:
        rounds = []
        text = f"{sum(each.status == 'planned' for each in candidates)} derived students would be compared"
    teacher = f"; the teacher has {params[0]:,} parameters" if params else ""
    twice = ", twice: a control is trained too" if request.control else ""
    summary = (
        f"Dry run: {text}{teacher}. It would train for {plural(request.epochs, 'epoch')} of {batches_in_epoch(job):,} "
        f"batches{twice}. Quality and speed are unknown."
    )
    report = _job_report(job, summary, student.changes if student else Outcome([]), rounds)
    return report.model_copy(update={"candidates": candidates})


def _job_report(job: AnyJob, summary: str, outcome: Outcome, rounds: list[Round]) -> EfficiencyReport:
    report = dry_run_report(job.request, job.context, job.loaded, summary)
    update = {"changed": outcome.changed, "skipped": outcome.skipped, "rounds": rounds}
    return report.model_copy(update=update | {"warnings": [*report.warnings, *job.datasets.notes]})


def dry_run_report(request: Compression, context: RunContext, loaded: LoadedModel, summary: str) -> EfficiencyReport:
    """Return the report of a dry run, without what only its verb knows."""
    return EfficiencyReport(
        outcome="ok",
        summary=summary,
        warnings=list(loaded.notes),
        next_steps=[plan_step(request)],
        **report_head(request, context, loaded.bench, loaded.device, None),
        macs_check=loaded.macs.check if loaded.macs else None,
        lineage=list(loaded.lineage[:-1]),
    )


def batches_in_epoch(job: AnyJob) -> int:
    """Count the batches of one epoch, up to `MAX_BATCHES`."""
    batches = job.datasets.batches
    plan = TrainingConfig.of(job.request, 1, job.loaded.device, job.request.seed)
    count = sum(1 for _ in itertools.islice(batches.epoch(plan.batch), MAX_BATCHES))
    if count >= MIN_STEPS_PER_EPOCH:
        return count
    plan = config_for_data(plan, job.request, batches, Objective(job.datasets.loss).check)
    return batches.survey(plan.batch, plan.seed, lambda _target: None)[0]


def _rounds_training(job: RoundsJob, rounds: int) -> str:
    epochs = job.datasets.epochs
    if not epochs:
        return ", without training"
    return f", with {plural(epochs, 'epoch')} of {batches_in_epoch(job):,} batches{' after each' if rounds > 1 else ''}"


def _planned_student(job: Job[DistillRequest], live: Live) -> tuple[Student | None, list[Candidate]]:
    params = job.request.student
    if isinstance(params, Auto):
        trials, skipped = derive_students(job, params, WORK_SPAN)
        return None, [*(planned_record(job, trial) for trial in trials), *skipped]
    if isinstance(params, Given):
        return load_student(job, params, live), []
    return derive_student(job, params, WORK_SPAN), []


def _seconds_per_sample(loaded: LoadedModel) -> float:
    """Time one forward pass in this process, as the basis of the estimate."""
    if loaded.module is None:
        return 0.02
    args, kwargs = one_sample(loaded)
    with torch.inference_mode():
        loaded.module(*args, **kwargs)
        start = time.perf_counter()
        loaded.module(*args, **kwargs)
    return time.perf_counter() - start


def _estimated_bytes(params: Params, program: Program) -> int | None:
    """Estimate the size: weights that the technique covers at their new bits plus scales, others unchanged."""
    traits = program.traits
    if traits is None:
        return None
    total = traits.total_weight_bytes
    covered = {
        Static: traits.conv_weight_bytes + traits.matmul_weight_bytes,
        Qat: traits.conv_weight_bytes + traits.matmul_weight_bytes,
        Dynamic: traits.matmul_weight_bytes + traits.recurrent_weight_bytes,
    }.get(type(params), 0)
    if isinstance(params, (Bf16, Fp16)):
        return total // 2
    if isinstance(params, WeightOnly):
        bits = params.num_bits + (32 + (0 if params.symmetric else params.num_bits)) / params.group_size
        packed = traits.matmul_weight_bytes * (1 - bits / 32)
        return total - round(packed) - traits.recurrent_weight_bytes * 3 // 4
    return total - covered * 3 // 4


def _planned_changes(plan: CandidatePlan, program: Program) -> list[Change]:
    """Return the layers that at least one int8 candidate would quantize."""
    if program.path is None:
        return []
    found = find_layers(load(program.path, weights=False))
    changes: dict[str, Change] = {}
    for spec in plan.specs:
        if isinstance(spec.params, (Static, Qat, Dynamic, WeightOnly)):
            for layer in select_layers(found, spec.params.targets, spec.params.ignore):
                if layer.op in INT8_OPS[type(spec.params)]:
                    what = f"planned: {spec.scheme}"
                    after = f"int{spec.params.num_bits}" if layer.op in ("MatMul", "Gemm") else "int8"
                    changes.setdefault(layer.path, Change(path=layer.path, what=what, before="float32", after=after))
    return list(changes.values())
