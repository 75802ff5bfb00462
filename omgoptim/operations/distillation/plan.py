"""Dry run of distill: the student or the student candidates, without training."""

from __future__ import annotations

from omgoptim.operations.compression_job import WORK, Job
from omgoptim.operations.distillation.student import Student, derived_student, given_student
from omgoptim.operations.distillation.student_search import derive_students, planned
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.next_steps import repeat_of, same_arguments, step
from omgoptim.operations.report_records import environment, shown_request
from omgoptim.operations.rounds.plan import batches_in_epoch
from omgoptim.reports import Candidate, EfficiencyReport, Round
from omgoptim.requests import DistillRequest
from omgoptim.requests.distill import Auto, Given


def plan_report(job: Job[DistillRequest], live: Live) -> EfficiencyReport:
    """Report the student or student candidates and the amount of training.

    Raises:
        OmgoptimError: no student can be derived or loaded.
    """
    request, context, loaded = job.request, job.context, job.loaded
    student, candidates = _student(job, live)
    output = {"output": request.output} if request.output else {}
    rounds, changes = [], None
    if student is not None:
        rounds = [Round(number=1, params=student.params, macs=student.macs)]
        changes = student.changes
        student_text = f"the student would be {student.name}, with {student.params:,} parameters"
    else:
        student_text = f"{sum(each.status == 'planned' for each in candidates)} derived students would be compared"
    return EfficiencyReport(
        outcome="ok",
        summary=f"Dry run: {student_text}{_teacher_phrase(job)}. {_training_phrase(job)} "
        "Quality and speed are unknown.",
        warnings=[*loaded.notes, *job.datasets.notes],
        next_steps=[step("distill", same_arguments(request) | output, "run what was planned")],
        verb="distill",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, None),
        changed=changes.changed if changes else [],
        skipped=changes.skipped if changes else [],
        rounds=rounds,
        candidates=candidates,
        macs_check=loaded.macs.check if loaded.macs else None,
        lineage=list(loaded.lineage[:-1]),
        repeat=repeat_of("distill", request),
    )


def _student(job: Job[DistillRequest], live: Live) -> tuple[Student | None, list[Candidate]]:
    params = job.request.student
    if isinstance(params, Auto):
        trials, passed_over = derive_students(job, params, WORK)
        return None, [*(planned(job, trial) for trial in trials), *passed_over]
    if isinstance(params, Given):
        return given_student(job, params, live), []
    return derived_student(job, params, WORK), []


def _teacher_phrase(job: Job[DistillRequest]) -> str:
    params = job.loaded.params
    return f"; the teacher has {params[0]:,} parameters" if params else ""


def _training_phrase(job: Job[DistillRequest]) -> str:
    request = job.request
    twice = ", twice: a control is trained too" if request.control else ""
    epochs = "1 epoch" if request.epochs == 1 else f"{request.epochs} epochs"
    return f"It would train for {epochs} of {batches_in_epoch(job):,} batches{twice}."
