"""Student search: derive students by several methods, train the most promising briefly, choose the best.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all train for `trial_epochs`, the better half for
twice as long, and so on. Quality is measured on the selection samples, never on the evaluation data.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from omgoptim.errors import OmgoptimError, TechniqueError, argument
from omgoptim.measure.timing import SCREENING_PLAN, Timing, time_artifacts
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.compression_job import Job
from omgoptim.operations.distillation.student import Student, as_student, name_of
from omgoptim.operations.distillation.student_training import train_student
from omgoptim.operations.per_sample_check import refuse_partial
from omgoptim.operations.save_module import save
from omgoptim.reports import Candidate
from omgoptim.requests import DistillRequest
from omgoptim.requests.distill import Auto
from omgoptim.techniques.distill._student.proposals import Proposal, proposals
from omgoptim.text import plural

Status = Literal["chosen", "finalist", "dropped", "failed", "skipped", "planned"]

DERIVING = 0.1
"""Fraction of the search's progress for deriving and timing the students, which takes far less time than training."""


@dataclass(slots=True)
class StudentTrial:
    """Result of one student in the search."""

    student: Student
    params: int
    macs: int | None
    """Multiply-accumulates of one sample."""
    speedup: float | None = None
    """Latency of the teacher over the student's, one launch."""
    quality: float | None = None
    """Quality on the selection samples, after its last trial."""
    epochs: int = 0
    """Epochs of training in all trials."""
    trained: nn.Module | None = None
    status: Status = "dropped"
    why: str = ""


def search_student(job: Job[DistillRequest], auto: Auto, span: tuple[float, float]) -> tuple[Student, list[Candidate]]:
    """Choose the student to train fully; return it with all candidates.

    Raises:
        TechniqueError: no student can be derived, or none reaches the targets.
    """
    trials, candidates = derive_students(job, auto, span)
    middle = span[0] + DERIVING * (span[1] - span[0])
    job.context.progress(f"timing {len(trials)} students", middle)
    _measure_speed(job, trials)
    alive = _fast_enough(trials, auto)
    best = _successive_halving(job, auto, alive, (middle, span[1]))
    best.status = "chosen"
    best.why = _chosen_reason(best, alive)
    records = [_candidate(job, trial) for trial in trials]
    return best.student, [*sorted(records, key=lambda each: each.status != "chosen"), *candidates]


def derive_students(
    job: Job[DistillRequest], auto: Auto, span: tuple[float, float]
) -> tuple[list[StudentTrial], list[Candidate]]:
    """Derive the most promising students that reach the target; return skipped ones with their reasons.

    Raises:
        TechniqueError: there is none.
    """
    job.context.progress("deriving students from the teacher", span[0])
    found, passed_over = proposals(copy.deepcopy(job.original), auto, job.module_run(span), auto.compression)
    skipped = [
        Candidate(name=name, scheme=name, runtime=job.runtime, status="skipped", why=why) for name, why in passed_over
    ]
    found = [each for each in found if not _fails_on_samples(job, each, skipped)]
    if not found:
        raise TechniqueError(
            "no student can be derived from this teacher",
            "; ".join(f"{each.name}: {each.why}" for each in skipped)
            or "no layer can be narrowed, replaced or removed",
            f"give a smaller target_compression, or a student of your own: {argument('student', 'file.py:callable')}",
        )
    return [
        StudentTrial(as_student(job, each.params, each.module, each.outcome), each.params_count, each.macs)
        for each in found
    ], skipped


def _fails_on_samples(job: Job[DistillRequest], proposal: Proposal, skipped: list[Candidate]) -> bool:
    """Return whether a student fails on samples that the teacher accepts; recorded in `skipped` then."""
    loaded = job.loaded
    try:
        refuse_partial(proposal.module, job.original, job.datasets.selection, loaded.signature, loaded.device)
    except TechniqueError as error:
        name = name_of(proposal.params)
        skipped.append(Candidate(name=name, scheme=name, runtime=job.runtime, status="skipped", why=error.reason))
        return True
    return False


def _measure_speed(job: Job[DistillRequest], trials: list[StudentTrial]) -> None:
    """Time each student with one launch against the teacher."""
    baseline = baseline_on(job.request.runtime, job.loaded, job.context)
    folders, timed = [], []
    for number, trial in enumerate(trials):
        folder = job.context.work / "students" / str(number)
        try:
            save(trial.student.module, trial.student.loaded, job.runtime, folder, job.context, to_time_only=True)
        except OmgoptimError as error:
            trial.status, trial.why = "failed", error.reason
            continue
        folders.append(folder)
        timed.append(trial)
    with job.context.measuring():
        timings = time_artifacts([baseline, *folders], job.loaded.bench, SCREENING_PLAN, job.request.seed)
    for trial, timing in zip(timed, timings[1:], strict=True):
        if isinstance(timing, Timing) and timing.speedup is not None:
            trial.speedup = timing.speedup.value
        elif isinstance(timing, OmgoptimError):
            trial.status, trial.why = "failed", timing.reason


def _fast_enough(trials: list[StudentTrial], auto: Auto) -> list[StudentTrial]:
    """Return the students that were timed and reach the target speed."""
    alive = [trial for trial in trials if trial.status != "failed"]
    if not alive:
        raise TechniqueError(
            "no derived student could be saved and timed", "; ".join(f"{t.student.name}: {t.why}" for t in trials)
        )
    if auto.target_speedup is None:
        return alive
    fast = [trial for trial in alive if trial.speedup is not None and trial.speedup >= auto.target_speedup]
    for trial in alive:
        if trial not in fast:
            trial.why = (
                f"{trial.speedup or 0:.2f}x the speed of the teacher, below the target of {auto.target_speedup:g}x"
            )
    if not fast:
        fastest = max(alive, key=lambda trial: trial.speedup or 0)
        raise TechniqueError(
            f"no derived student is {auto.target_speedup:g}x as fast as the teacher",
            f"the fastest of {len(alive)}, {fastest.student.name}, was measured at {fastest.speedup or 0:.2f}x",
            "give a larger target_compression, a lower target_speedup, or runtime onnxruntime",
        )
    return fast


def _successive_halving(
    job: Job[DistillRequest], auto: Auto, alive: list[StudentTrial], span: tuple[float, float]
) -> StudentTrial:
    """Train all students, keep the better half and double the epochs, until one is left."""
    epochs, rung = auto.trial_epochs, 1
    total = _training_count(len(alive))
    done = 0
    while len(alive) > 1:
        for trial in alive:
            number = f"trial {rung} of {trial.student.name}"
            part = tuple(span[0] + (span[1] - span[0]) * (done + each) / total for each in (0, 1))
            state = train_student(
                job,
                trial.student if trial.trained is None else replace(trial.student, module=trial.trained),
                number,
                (part[0], part[1]),
                teacher=job.original,
                epochs=epochs,
            )
            trial.trained, trial.quality = state.module, state.quality
            trial.epochs += epochs
            done += 1
        alive = sorted(alive, key=lambda each: (-(each.quality or -math.inf), each.params))
        kept = alive[: math.ceil(len(alive) / 2)]
        for trial in alive[len(kept) :]:
            trial.why = f"after {plural(trial.epochs, 'epoch')} others had higher quality on the selection samples"
        alive, epochs, rung = kept, 2 * epochs, rung + 1
    return alive[0]


def _training_count(count: int) -> int:
    """Return the number of trainings of successive halving."""
    total = 0
    while count > 1:
        total += count
        count = math.ceil(count / 2)
    return max(total, 1)


def _chosen_reason(best: StudentTrial, alive: list[StudentTrial]) -> str:
    if len(alive) == 1:
        return "the only student that reaches the targets"
    return f"the best of {len(alive)} on the selection samples after {plural(best.epochs, 'epoch')} of trial training"


def _candidate(job: Job[DistillRequest], trial: StudentTrial) -> Candidate:
    quality = trial.quality if trial.quality is not None and math.isfinite(trial.quality) else None
    seen = planned_record(job, trial)
    return seen.model_copy(
        update={
            "speedup": trial.speedup,
            "quality": quality,
            "quality_drop": None if quality is None else job.drop(quality),
            "status": trial.status,
            "why": f"{trial.why}; {seen.why}",
        }
    )


def planned_record(job: Job[DistillRequest], trial: StudentTrial) -> Candidate:
    """Return the record of a planned student."""
    return Candidate(
        name=trial.student.name,
        scheme=trial.student.scheme,
        runtime=job.runtime,
        status="planned",
        why=_size_reason(job, trial),
    )


def _size_reason(job: Job[DistillRequest], trial: StudentTrial) -> str:
    before = job.loaded.params[0] if job.loaded.params else trial.params
    size = f"{trial.params:,} parameters ({before / trial.params:.1f}x fewer)"
    return f"{size}, {trial.macs:,} multiply-accumulates" if trial.macs else size
