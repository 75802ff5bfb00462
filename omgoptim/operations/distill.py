"""distill: train a smaller student on the teacher's outputs, and report the reopened artifact."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from omgoptim.errors import DataError, RequestError, argument
from omgoptim.hardware import refuse_beyond_memory, training_bytes
from omgoptim.measure.quality import compare_quality, read_outputs
from omgoptim.operations.compression_job import WORK_SPAN, Job, open_job
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import loss_for
from omgoptim.operations.distillation.student import Student, derive_student, load_student
from omgoptim.operations.distillation.student_search import search_student
from omgoptim.operations.distillation.student_training import train_student, training_record
from omgoptim.operations.dry_run import plan_distill
from omgoptim.operations.execution import refuse_unsendable
from omgoptim.operations.final_measurement import FinalChoice, MeasuredArtifact, NamedArtifact, guard_reasons
from omgoptim.operations.final_report import new_output_folder
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.reference_outputs import metric_of
from omgoptim.operations.report_builder import FinalModel, build_report
from omgoptim.operations.report_records import finite
from omgoptim.operations.rounds.checkpoint import RoundState
from omgoptim.operations.save_module import save
from omgoptim.operations.timing import fraction_progress
from omgoptim.operations.verdict import holds
from omgoptim.reports import Candidate, Control, EfficiencyReport
from omgoptim.requests import DistillRequest
from omgoptim.requests.distill import Auto, Given

SEARCH_SHARE, DERIVING = 0.4, 0.05
"""Fraction of the progress for choosing the student: with trials, and without. Chosen: for display only."""

NO_TARGETS_NOTE = (
    "the training data has no targets: the student is trained on the teacher's outputs only (alpha is unused)"
)


def distill(request: DistillRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Train a student and measure it against its teacher. See `DistillRequest`."""
    live = live or Live()
    refuse_unsendable(request, live)
    output = new_output_folder(request, context)
    job = open_job(request, context, live, _refuse_without_data)
    if request.plan:
        return plan_distill(job, live)
    start, end = WORK_SPAN
    middle = start + (end - start) * (SEARCH_SHARE if isinstance(request.student, Auto) else DERIVING)
    student, candidates = _student(job, live, (start, middle))
    if isinstance(request.student, Given):
        loss = loss_for(request, student.loaded, student.module, job.datasets.statistics, live)
        job = replace(job, datasets=replace(job.datasets, loss=loss))
    _refuse_unusable(job, student)
    parts = 2 if request.control else 1
    half = middle + (end - middle) / parts
    distilled = train_student(job, student, "student", (middle, half), teacher=job.original)
    control = train_student(job, student, "control", (half, end), teacher=None) if request.control else None
    return build_report(job, _final_model(job, student, distilled, control, candidates), output)


def _student(job: Job[DistillRequest], live: Live, span: tuple[float, float]) -> tuple[Student, list[Candidate]]:
    params = job.request.student
    if isinstance(params, Auto):
        return search_student(job, params, span)
    if isinstance(params, Given):
        job.context.progress("loading the student", span[0])
        return load_student(job, params, live), []
    job.context.progress("deriving the student from the teacher", span[0])
    return derive_student(job, params, span), []


def _refuse_without_data(loaded: LoadedModel) -> None:
    if loaded.data.real:
        return
    raise DataError(
        "distillation needs training data",
        "the student is trained on the teacher's outputs for real inputs, and no data was given; labels are optional",
        f"give {argument('data', 'file.py:callable')}, whose load('train') returns the training samples",
    )


def _refuse_unusable(job: Job[DistillRequest], student: Student) -> None:
    if job.request.control and job.datasets.loss is None:
        raise RequestError(
            "the control (the student without the teacher) cannot be trained",
            "it learns from targets only, and the training data has none",
            "leave control out, or let the batches include targets",
        )
    refuse_beyond_memory(training_bytes(student.module), "training the student beside its teacher")


def _final_model(
    job: Job[DistillRequest],
    student: Student,
    distilled: RoundState,
    control: RoundState | None,
    candidates: list[Candidate],
    failed: str = "",
) -> FinalModel:
    """Build the final model: the better of student and control on the selection samples.

    The other one follows if it was within the guard there, and the better one fails it on the evaluation data. `failed`
    says how the better one failed: the final model is the other one then.
    """
    control_kept = control is not None and (control.quality > distilled.quality) is not bool(failed)
    kept = control if control is not None and control_kept else distilled
    other = distilled if control_kept else control
    trained = "trained without the teacher" if control_kept else "distilled"
    warnings = [*student.notes, *kept.warnings, *([failed] if failed else [])]
    if job.datasets.loss is None:
        warnings.append(NO_TARGETS_NOTE)
    before = job.loaded.params[0] if job.loaded.params else None
    if before is not None and student.params >= before:
        warnings.append(f"the student is no smaller than the teacher: {student.params:,} against {before:,} parameters")
    if kept.stopped:
        warnings.append(f"training ended early: {kept.stopped}")

    def fallback(measured: MeasuredArtifact) -> FinalModel | None:
        if failed or other is None or not holds(job.drop(other.quality), job.request.max_quality_drop):
            return None
        reasons = ", ".join(guard_reasons(measured, job.request.max_quality_drop))
        names = ("the distilled student", "the student trained without the teacher")
        first, second = names[::-1] if control_kept else names
        words = f"{first} failed on the evaluation data ({reasons}): the next of the fixed order, {second}, was tried"
        return _final_model(job, student, distilled, control, candidates, words)

    return FinalModel(
        name=f"student {student.name}{f', {trained}' if failed else ''}",
        module=kept.module,
        loaded=student.loaded,
        changes=student.changes,
        warnings=warnings,
        control=partial(_control, job, student, control, other.module, control_kept) if control and other else None,
        training=training_record(job, student, distilled),
        candidates=candidates,
        fallback=fallback,
    )


def _control(
    job: Job[DistillRequest],
    student: Student,
    control: RoundState,
    other: nn.Module,
    kept: bool,
    chosen: FinalChoice[NamedArtifact],
) -> Control:
    """Compare control and distilled student; the one that is not the artifact is run in a fresh process too.

    `other` is the one of the two modules that is not the artifact; `kept` is True if the control is the artifact.
    """
    request, loaded, context = job.request, job.loaded, job.context
    folder = context.work / "other"
    save(other, student.loaded, job.runtime, folder, context)
    outputs = context.work / "final" / "other"
    _run(job, folder, outputs)
    original = read_outputs(chosen.timings.original_outputs)
    distilled, alone = read_outputs(chosen.winner.outputs), read_outputs(outputs)
    if kept:
        distilled, alone = alone, distilled
    targets = loaded.evaluation.targets
    metric = metric_of(loaded, original, targets, request.time_limit_s)
    quality = compare_quality(metric, alone, distilled, targets, request.seed, original=original)
    return Control(
        quality=quality.before,
        gain=-quality.drop,
        gain_low=finite(-quality.high),
        gain_high=finite(-quality.low),
        kept=kept,
        training=training_record(job, student, control),
    )


def _run(job: Job[DistillRequest], folder: Path, target: Path) -> None:
    with job.loaded.bench.start(folder, {}) as process:
        process.begin_open()
        process.end_open()
        process.run_samples(job.loaded.eval_folder, target, fraction_progress(job.context, "evaluating the control"))
