"""Trials as tasks, with a stand-in for the training: halving and results are those of a search in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from omgoptim.architecture_search.drive import Driven, Plan, TrialLoop, drive
from omgoptim.architecture_search.runner import WEIGHTS, MeasuredCost, TrialFunctions, climb, load_weights, save_weights
from omgoptim.architecture_search.space import Configuration, Knob, Space
from omgoptim.architecture_search.trials import TrialFolders, TrialResult, TrialSpec
from omgoptim.executors import Task, TaskResult
from omgoptim.executors.task import WORKER
from omgoptim.models.source import Source
from omgoptim.operations.architecture_search.tasks import TaskRunner
from omgoptim.operations.context import RunContext
from omgoptim.requests import parse

SPACE = Space((Knob("width", (1, 2, 3, 4)), Knob("depth", (0, 1, 2, 3))))
PLAN = Plan(trials=10, seed=0, parent="", data="", epochs=9, in_flight=3)


def build(configuration: Configuration) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(int(str(configuration["width"])), 1 + int(str(configuration["depth"])))


def train(module: nn.Module, rung: int, epochs: int, checkpoints: Path) -> float:
    """Quality by the shape, the more of it the longer the training."""
    assert isinstance(module, nn.Linear)
    with torch.no_grad():
        module.weight += 1.0
    return (module.in_features * 7 + module.out_features * 5) % 11 * (rung + 1.0)


def measure(module: nn.Module, folder: Path) -> MeasuredCost:
    size = sum(parameter.numel() for parameter in module.parameters())
    if folder.name == "artifact":
        folder.mkdir()
        save_weights(module, folder / WEIGHTS)
    return MeasuredCost(size_bytes=size, loads={"size": size / 12})


class Threads:
    """An executor whose tasks train by the stand-in, in threads."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.trained: list[int] = []
        self._pool = ThreadPoolExecutor(workers)

    def submit(self, task: Task) -> Future[TaskResult]:
        assert json.loads(json.dumps(dict(task.payload))) is not None
        return self._pool.submit(self._run, task)

    def _run(self, task: Task) -> TaskResult:
        payload = task.payload
        spec = TrialSpec.model_validate(payload["spec"])
        module = build(spec.configuration)
        if "weights" in task.inputs:
            load_weights(module, task.inputs["weights"])
        qualities = climb(train, module, spec, task.target, payload["others"], payload["before"])
        self.trained.append(spec.number)
        task.target.mkdir()
        save_weights(module, task.target / WEIGHTS)
        (task.target / WORKER).write_text("{}")
        record = {"spec": payload["spec"], "screened": payload["screened"], "qualities": qualities, "seconds": 1.5}
        (task.target / "trained.json").write_text(json.dumps(record))
        return TaskResult(task.target, "here", 1, 1, 1.5)

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        self._pool.shutdown()


def runner(folder: Path, executor: Threads | None) -> TaskRunner:
    folder.mkdir(exist_ok=True)
    request = parse("search", {"model": "net.py:space", "target_size_mb": 1, "threads": 1})
    context = RunContext(folder, "search-1", folder, "", "", lambda _stage, _done: None)
    loaded = SimpleNamespace(source=Source())
    job = cast(Any, SimpleNamespace(request=request, context=context, runtime="torch_eager", loaded=loaded))
    return TaskRunner(executor, job, TrialFunctions(build, measure, train), "")


def searched(folder: Path, executor: Threads | None) -> tuple[Driven, dict[int, TrialResult]]:
    tasks = runner(folder, executor)
    folders = TrialFolders(folder / "trials")
    tasks.conclude_left(folders)

    def loads(_results: dict[int, TrialResult]) -> Any:
        return lambda rows: (rows.sum(axis=1) + 2) / 8

    def never(spec: TrialSpec, into: Path) -> TrialResult:
        raise AssertionError("the search did not begin this trial by its own function")

    driven = drive(SPACE, loads, TrialLoop(never, PLAN, folder, start=partial(tasks.start, folders)))
    return driven, {number: result.model_copy(update={"seconds": 0.0}) for number, result in folders.results().items()}


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_have_the_trials_rungs_and_best_network_of_one_process(tmp_path: Path, workers: int) -> None:
    alone = searched(tmp_path / "alone", None)
    executor = Threads(workers)
    shared = searched(tmp_path / "shared", executor)
    executor.close()
    assert shared == alone
    outcomes = {result.outcome for result in alone[1].values()}
    assert outcomes >= {"trained", "stopped"}
    assert alone[0].trained == 10


def test_a_trial_that_was_trained_before_a_kill_is_not_trained_again(tmp_path: Path) -> None:
    executor = Threads(1)
    tasks, folders = runner(tmp_path, executor), TrialFolders(tmp_path / "trials")
    spec = TrialSpec(number=0, configuration={"width": 2, "depth": 1}, seed=0, parent="", data="", epochs=9)
    tasks.start(folders, spec)
    executor.close()  # the task has ended, and the driver died before it took the result
    assert (tmp_path / "trials" / "00000.trained").is_dir()
    driven, results = searched(tmp_path, Threads(1))
    assert executor.trained == [0]
    assert results[0].outcome == "trained"
    assert not (tmp_path / "trials" / "00000.trained").exists()
    assert driven.trained == 10


def test_the_best_are_trained_to_the_end_from_the_weights_they_stopped_at(tmp_path: Path) -> None:
    executor = Threads(2)
    searched(tmp_path, executor)
    tasks, folders = runner(tmp_path, executor), TrialFolders(tmp_path / "trials")
    finals = TrialFolders(tmp_path / "finals")
    found = tasks.finalists(folders, finals, 3)
    executor.close()
    assert [result.outcome for _, result in found] == ["trained"] * 3
    for spec, result in found:
        module, start = build(spec.configuration), build(spec.configuration)
        load_weights(module, finals.path(spec.number) / "artifact" / WEIGHTS)
        assert isinstance(module, nn.Linear)
        assert isinstance(start, nn.Linear)
        assert torch.allclose(module.weight, start.weight + len(result.rungs))
