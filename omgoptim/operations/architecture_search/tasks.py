"""Trials as tasks: networks are screened and measured here, and trained by whichever worker is free.

Latency is never measured inside a task: Ray gives it one thread and several share a machine. The driver times each
network on the target device before its training, and the best again after, with the tasks of this machine stopped
meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.architecture_search.drive import Started
from omgoptim.architecture_search.runner import (
    WEIGHTS,
    MeasuredCost,
    Screened,
    TrialFunctions,
    climb,
    conclude,
    finished,
    load_weights,
    save_weights,
    screen,
    unfinished,
)
from omgoptim.architecture_search.trials import MOST_BYTES, TrialFolders, TrialResult, TrialSpec
from omgoptim.errors import OmgoptimError
from omgoptim.executors import Executor, Task, TaskResult
from omgoptim.executors.task import WORKER, Work
from omgoptim.models.security.file_integrity import read_regular_file
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.operations.architecture_search.costs import Costs, Limits
from omgoptim.operations.architecture_search.spaces import automatic_space, users_space
from omgoptim.operations.compression_job import Job
from omgoptim.operations.datasets import load_datasets
from omgoptim.operations.execution import (
    parent_files,
    refuse_other_weights,
    request_here,
    sent,
    threads_each,
    with_parent,
)
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.prepare import prepare
from omgoptim.operations.save_module import require_module
from omgoptim.requests import SearchRequest

TRAINED = ".trained"
"""Suffix of the folder of a trial that a task trained, until its result is taken here."""

FUNCTION, LOAD = f"{__name__}:train_trial", f"{__name__}:load_problem"

Training = Callable[[nn.Module, int, int, Path], float]


@dataclass(frozen=True, slots=True)
class TaskRunner:
    """Runs the trainings of a search on an executor; without one here, when their results are waited for."""

    executor: Executor | None
    job: Job[SearchRequest]
    steps: TrialFunctions
    identity: str
    """Hash of the weights that every worker must start from; empty without a model."""

    def start(self, folders: TrialFolders, spec: TrialSpec) -> Started:
        """Screen a network here, and submit its training; what it is compared with at its rungs is fixed now."""
        scratch = self.job.context.work / "screened"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            screened = screen(self.steps, spec, scratch)
        except OmgoptimError as error:
            failed = folders.run(spec, _raising(error))
            return Started(lambda: failed)
        if isinstance(screened, TrialResult):
            rejected = folders.run(spec, lambda _spec, _folder: screened)
            return Started(lambda: rejected, rejected=True)
        others = list(folders.histories().values())
        if self.executor is None:
            return Started(lambda: folders.run(spec, partial(self._here, screened, others)))
        future = self._submit(folders, spec, _asked(screened.untrained, screened.predicted, others, ()))
        return Started(lambda: folders.run(spec, lambda _spec, folder: self._concluded(future.result().folder, folder)))

    def _here(self, screened: Screened, others: list[tuple[float, ...]], spec: TrialSpec, folder: Path) -> TrialResult:
        qualities = climb(self.steps.train, screened.module, spec, folder / "checkpoints", others)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        save_weights(screened.module, folder / WEIGHTS)
        return conclude(spec, qualities, screened.untrained, screened.predicted)

    def _trial_of(self, trained: Path, _spec: TrialSpec, folder: Path) -> TrialResult:
        return self._concluded(trained, folder)

    def conclude_left(self, folders: TrialFolders) -> None:
        """Take the results of the trials that were trained before the search was cut off."""
        for trained in sorted(folders.root.glob(f"*{TRAINED}")):
            spec = TrialSpec.model_validate(_record(trained)["spec"])
            folders.run(spec, partial(self._trial_of, trained))
            shutil.rmtree(trained, ignore_errors=True)

    def finalists(self, folders: TrialFolders, finals: TrialFolders, count: int) -> list[tuple[TrialSpec, TrialResult]]:
        """Train the best trials to the end, all at the same time: see `runner.finalists`."""
        chosen = unfinished(folders, count)
        futures: dict[int, Future[TaskResult]] = {}
        for spec, before in chosen:
            if before.outcome != "trained" and finals.result(spec.number) is None:
                weights = {"weights": folders.path(spec.number) / WEIGHTS}
                asked = _asked(MeasuredCost(), before.predicted_ms, None, before.rungs)
                futures[spec.number] = self._submit(finals, spec, asked, weights)
        found = []
        for spec, before in chosen:

            def trial(spec: TrialSpec, folder: Path, before: TrialResult = before) -> TrialResult:
                weights = folders.path(spec.number) / WEIGHTS
                if spec.number in futures:
                    before = self._concluded(futures[spec.number].result().folder, folder)
                    weights = folder / WEIGHTS
                return finished(self.steps, spec, folder, before, weights).model_copy(
                    update={"seconds": before.seconds}
                )

            found.append((spec, finals.run(spec, trial)))
        return found

    def _submit(
        self, folders: TrialFolders, spec: TrialSpec, asked: Mapping[str, Any], inputs: Mapping[str, Path] | None = None
    ) -> Future[TaskResult]:
        assert self.executor is not None  # `start` and `finalists` see to it
        problem = _sent_problem(self.job, self.identity)
        payload = {"problem": problem, "spec": spec.model_dump(mode="json"), **asked}
        key = hashlib.sha256(json.dumps([spec.configuration, spec.seed, spec.epochs]).encode()).hexdigest()[:16]
        target = folders.root / f"{spec.number:05d}{TRAINED}"
        inputs = {**(inputs or {}), **parent_files(self.job.loaded.source.artifact)}
        return self.executor.submit(Task(FUNCTION, payload, target, f"{key}.checkpoints", inputs))

    def _concluded(self, trained: Path, folder: Path) -> TrialResult:
        record = _record(trained)
        for name in (WEIGHTS, WORKER):
            os.replace(trained / name, folder / name)
        cost, predicted = MeasuredCost(**record["screened"]["cost"]), record["screened"]["predicted"]
        result = conclude(TrialSpec.model_validate(record["spec"]), tuple(record["qualities"]), cost, predicted)
        shutil.rmtree(trained, ignore_errors=True)
        return result.model_copy(update={"seconds": record["seconds"]})


def _asked(
    untrained: MeasuredCost, predicted: float | None, others: list[tuple[float, ...]] | None, before: tuple[float, ...]
) -> dict[str, Any]:
    """Return the training that a task does: the network's cost before it, and the arguments of `climb`."""
    return {"screened": {"cost": asdict(untrained), "predicted": predicted}, "others": others, "before": before}


def train_trial(payload: Mapping[str, Any], work: Work) -> None:
    """Train a network rung by rung; the task of a worker."""
    spec = TrialSpec.model_validate(payload["spec"])
    build, train = _loaded(payload, work)
    began = time.monotonic()
    module = build(spec.configuration)
    if "weights" in work.inputs:
        load_weights(module, work.inputs["weights"])
    qualities = climb(train, module, spec, work.checkpoints, payload["others"], payload["before"])
    save_weights(module, work.folder / WEIGHTS)
    record = {
        "spec": payload["spec"],
        "screened": payload["screened"],
        "qualities": qualities,
        "seconds": time.monotonic() - began,
    }
    (work.folder / "trained.json").write_text(json.dumps(record), encoding="utf-8")


def load_workers(executor: Executor, job: Job[SearchRequest], identity: str) -> None:
    """Let every worker load the model, its data and the space while the driver measures the first networks.

    An error of it comes with the first trial.
    """
    place = job.context.work / "loaded"
    place.mkdir(parents=True, exist_ok=True)
    payload = {"problem": _sent_problem(job, identity)}
    for number in range(executor.workers):
        executor.submit(Task(LOAD, payload, place / str(number), inputs=parent_files(job.loaded.source.artifact)))


def load_problem(payload: Mapping[str, Any], work: Work) -> None:
    """Load what every trial needs; the task of a worker that has no trial yet."""
    _loaded(payload, work)


def _sent_problem(job: Job[SearchRequest], identity: str) -> dict[str, Any]:
    record = sent("search", job.request, job.context, threads_each(job.request))
    return record | {"runtime": job.runtime, "identity": identity}


def _loaded(payload: Mapping[str, Any], work: Work) -> tuple[Callable[[Mapping[str, Any]], nn.Module], Training]:
    return _problem(json.dumps(with_parent(payload["problem"], work.inputs), sort_keys=True))


@cache
def _problem(record: str) -> tuple[Callable[[Mapping[str, Any]], nn.Module], Training]:
    """Load the model, its data and the space of a search, once in a worker process.

    Raises:
        RunError: the model has other weights here than where the search was started.
    """
    from omgoptim.operations.architecture_search.trials import Trials

    asked = json.loads(record)
    request, context = request_here(asked)
    assert isinstance(request, SearchRequest)
    searched, live = users_space(request, PathPolicy.of_request(context.project, request), Live())
    loaded = prepare(request, context, live)
    original = require_module(loaded, "search")
    refuse_other_weights(original, asked["identity"], request.model)
    job = Job(request, context, loaded, load_datasets(request, loaded, original, live), original, asked["runtime"])
    searched = searched or automatic_space(job, (0.0, 1.0))
    costs = Costs(job, loaded.baseline, 1.0, Limits(None, None, None), None)
    trials = Trials(job, searched, costs, None, None if searched.alone else original, time.monotonic())
    return searched.build, trials.training()


def _record(trained: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(read_regular_file(trained / "trained.json", MOST_BYTES))
    return record


def _raising(error: OmgoptimError) -> Callable[[TrialSpec, Path], TrialResult]:
    def trial(_spec: TrialSpec, _folder: Path) -> TrialResult:
        raise error

    return trial
