"""A whole search on a function in place of training: what it counts, what it refuses, and kills at every point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omgoptim.architecture_search.search_loop import (
    LoopSettings,
    StartedTrial,
    TrialLoop,
    search_conditional,
    search_product,
)
from omgoptim.architecture_search.space import Knob, Space
from omgoptim.architecture_search.trials import TrialFolders, TrialResult, TrialSpec
from omgoptim.errors import RunError, TechniqueError

SPACE = Space(tuple(Knob(f"stage{number}", (0, 1, 2)) for number in range(4)))
PLAN = LoopSettings(trials=12, seed=0, parent="sha256:m", data="sha256:d", epochs=1)

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_search_loop import SPACE, PLAN, loads, loop, trained
from omgoptim.architecture_search.search_loop import search_product

calls = 0

def trial(spec, folder):
    global calls
    calls += 1
    if calls == {dies_in} and {inside}:
        (folder / "half").write_text("done")
        os.kill(os.getpid(), signal.SIGKILL)
    return trained(spec, folder)

if not {inside}:
    from omgoptim.architecture_search.study import SearchStudy
    finish = SearchStudy.finish
    def dying(self, optuna_trial, result):
        if calls == {dies_in}:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, optuna_trial, result)
    SearchStudy.finish = dying
search_product(SPACE, loads, loop(trial, Path({folder!r})))
"""


def loop(trial: Callable[[TrialSpec, Path], TrialResult], folder: Path, plan: LoopSettings = PLAN) -> TrialLoop:
    """A loop whose trials run in this process."""
    folders = TrialFolders(folder / "trials")

    def start(spec: TrialSpec) -> StartedTrial:
        found = folders.run(spec, trial)
        return StartedTrial(lambda: found, found.outcome == "rejected")

    return TrialLoop(start, plan, folder)


def loads(_results: dict[int, TrialResult]) -> Any:
    return lambda rows: rows.sum(axis=1) / 5.0


def trained(spec: TrialSpec, folder: Path) -> TrialResult:
    with open(folder.parent / "log.txt", "a") as log:
        log.write(json.dumps(spec.configuration) + "\n")
    values = [int(str(value)) for value in spec.configuration.values()]
    return TrialResult(outcome="trained", rungs=(2.0 * values[0] + values[-1],), loads={"latency": sum(values) / 5})


def configurations(folder: Path) -> list[str]:
    """Configurations of the finished trials, in the order of their numbers."""
    specs = [json.loads(file.read_text()) for file in sorted(folder.glob("trials/*/spec.json"))]
    return [json.dumps(spec["configuration"]) for spec in specs]


def test_a_search_trains_as_many_as_were_asked_for_and_finds_the_best(tmp_path: Path) -> None:
    ended = search_product(SPACE, loads, loop(trained, tmp_path))
    assert (ended.trained, ended.rejected, ended.failed, ended.exhausted) == (12, 0, 0, False)
    assert ended.best is not None
    best = TrialFolders(tmp_path / "trials").result(ended.best)
    assert best is not None
    assert best.rungs == (6.0,)


def test_a_finished_search_runs_nothing_again(tmp_path: Path) -> None:
    first = search_product(SPACE, loads, loop(trained, tmp_path))
    assert search_product(SPACE, loads, loop(trained, tmp_path)).best == first.best
    assert len((tmp_path / "trials" / "log.txt").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("dies_in", "inside"),
    [
        (5, True),
        (3, False),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(10, False, marks=pytest.mark.slow),
    ],
)
def test_a_kill_loses_no_finished_trial_and_repeats_none(tmp_path: Path, dies_in: int, inside: bool) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    ended = search_product(SPACE, loads, loop(trained, whole))
    code = KILLED.format(here=str(Path(__file__).parent), dies_in=dies_in, inside=inside, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    finished = len(configurations(folder))
    assert finished == (dies_in - 1 if inside else dies_in)
    again = search_product(SPACE, loads, loop(trained, folder))
    log = (folder / "trials" / "log.txt").read_text().splitlines()
    assert log == configurations(folder) == configurations(whole)
    assert again.trained == ended.trained == 12
    assert not list(folder.glob("trials/*.partial-*"))


@pytest.mark.parametrize("workers", [1, 3])
def test_which_trials_a_search_has_depends_on_those_in_flight_and_not_on_the_workers(
    tmp_path: Path, workers: int
) -> None:
    plan = replace(PLAN, in_flight=3)
    (tmp_path / "here").mkdir()
    alone = search_product(SPACE, loads, loop(trained, tmp_path / "here", plan))
    (tmp_path / "there").mkdir()
    folders = TrialFolders(tmp_path / "there" / "trials")
    most, running = [0], [0]

    def run(spec: TrialSpec) -> TrialResult:
        return folders.run(spec, trained)

    def start(spec: TrialSpec) -> StartedTrial:
        running[0] += 1
        most[0] = max(most[0], running[0])
        future = pool.submit(run, spec)

        def wait() -> TrialResult:
            running[0] -= 1
            return future.result()

        return StartedTrial(wait)

    with ThreadPoolExecutor(workers) as pool:
        shared = search_product(SPACE, loads, TrialLoop(start, plan, tmp_path / "there"))
    assert shared == alone
    assert most == [3]
    assert configurations(tmp_path / "there") == configurations(tmp_path / "here")
    assert len(set(configurations(tmp_path / "here"))) == 12


def test_a_candidate_that_is_too_slow_does_not_count(tmp_path: Path) -> None:
    def trial(spec: TrialSpec, folder: Path) -> TrialResult:
        if spec.configuration["stage1"] == 2:
            return TrialResult(outcome="rejected", loads={"latency": 1.2})
        return trained(spec, folder)

    ended = search_product(SPACE, loads, loop(trial, tmp_path))
    assert ended.trained == 12
    assert ended.rejected > 0
    assert len(configurations(tmp_path)) == 12 + ended.rejected


def test_a_trial_that_raises_fails_alone(tmp_path: Path) -> None:
    def trial(spec: TrialSpec, folder: Path) -> TrialResult:
        if spec.configuration["stage0"] == 1:
            raise TechniqueError("the network has no output", "its kernel is too large")
        return trained(spec, folder)

    ended = search_product(SPACE, loads, loop(trial, tmp_path))
    assert ended.trained == 12
    assert ended.failed > 0


def test_a_quality_that_is_no_number_fails_alone(tmp_path: Path) -> None:
    def trial(spec: TrialSpec, folder: Path) -> TrialResult:
        bad = spec.configuration["stage0"] == 2
        return TrialResult(outcome="trained", rungs=(float("nan"),)) if bad else trained(spec, folder)

    ended = search_product(SPACE, loads, loop(trial, tmp_path))
    assert ended.trained == 12


def test_the_commonest_reason_is_told_when_every_trial_fails(tmp_path: Path) -> None:
    def trial(spec: TrialSpec, folder: Path) -> TrialResult:
        raise TechniqueError("the network has no output", "its kernel is too large")

    with pytest.raises(TechniqueError, match="no trial of the search could be trained") as caught:
        search_product(SPACE, loads, loop(trial, tmp_path))
    assert "kernel is too large" in caught.value.why


def test_a_limit_that_nothing_is_within_ends_without_a_training(tmp_path: Path) -> None:
    with pytest.raises(TechniqueError, match="no network of the search meets the targets"):
        search_product(SPACE, lambda _: lambda rows: rows.sum(axis=1) + 2.0, loop(trained, tmp_path))
    assert configurations(tmp_path) == []


def test_a_small_space_is_exhausted(tmp_path: Path) -> None:
    few = Space((Knob("stage0", (0, 1)), Knob("stage3", (0, 1))))
    ended = search_product(few, lambda _: lambda rows: rows.sum(axis=1) / 2.0, loop(trained, tmp_path))
    assert (ended.trained, ended.exhausted) == (4, True)


def test_a_conditional_space_counts_only_what_it_trains(tmp_path: Path) -> None:
    def parameters(trial: Any) -> None:
        for at in range(trial.suggest_int("depth", 1, 3)):
            trial.suggest_categorical(f"w{at}", [8, 16])

    def trial(spec: TrialSpec, folder: Path) -> TrialResult:
        width = sum(int(str(value)) for name, value in spec.configuration.items() if name != "depth")
        loads = {"latency": width / 32}
        if width > 32:
            return TrialResult(outcome="rejected", loads=loads)
        return TrialResult(outcome="trained", rungs=(width / 32,), loads=loads)

    ended = search_conditional(parameters, loop(trial, tmp_path))
    assert ended.trained == 12
    assert ended.rejected > 0


def test_a_damaged_result_is_an_error_with_the_trials_number(tmp_path: Path) -> None:
    folders = TrialFolders(tmp_path)
    spec = TrialSpec(number=3, configuration={}, seed=0, parent="m", data="d", epochs=1)
    folders.run(spec, lambda spec, folder: TrialResult(outcome="trained", rungs=(1.0,)))
    (folders.path(3) / "result.json").write_text("{")
    with pytest.raises(RunError, match="trial 3"):
        folders.result(3)


def test_a_trial_leaves_nothing_when_it_ends_by_a_bug(tmp_path: Path) -> None:
    folders = TrialFolders(tmp_path)
    spec = TrialSpec(number=0, configuration={}, seed=0, parent="m", data="d", epochs=1)
    with pytest.raises(ZeroDivisionError):
        folders.run(spec, lambda spec, folder: TrialResult(outcome="trained", rungs=(1 / 0,)))
    assert os.listdir(tmp_path) == []
