"""The study: one objective, constraints, and nothing lost or done twice after a kill at any point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omgoptim.architecture_search.propose import propose
from omgoptim.architecture_search.space import Indices, Knob, Space
from omgoptim.architecture_search.study import Finished, Rejected, SearchSettings, SearchStudy

SPACE = Space(tuple(Knob(f"stage{number}", (0, 1, 2)) for number in range(4)))


def load(rows: Indices) -> np.ndarray:
    return rows.sum(axis=1) / 5.0


def quality(configuration: dict[str, int]) -> float:
    return float(2 * configuration["stage0"] + configuration["stage1"])


def opened(tmp_path: Path) -> SearchStudy:
    return SearchStudy(SearchSettings(seed=3, journal=tmp_path / "study.log"))


def test_a_told_study_is_the_same_after_it_is_opened_again(tmp_path: Path) -> None:
    search = opened(tmp_path)
    first = search.ask(SPACE, {"stage0": 2, "stage1": 0, "stage2": 1, "stage3": 1})
    search.finish(first, Finished((0.9,), {"latency": 0.95}))
    second = search.ask(SPACE, {"stage0": 1, "stage1": 1, "stage2": 1, "stage3": 1})
    search.finish(second, Finished((0.5,), {"latency": 0.9}, complete=False))
    third = search.ask(SPACE, {"stage0": 2, "stage1": 2, "stage2": 2, "stage3": 2})
    search.reject(third, Rejected({"latency": 1.6}))
    again = opened(tmp_path)
    assert (len(again), again.started, again.best()) == (2, 3, (0, 0.9))
    seen = again.observations(SPACE)
    assert seen.rows.tolist() == [[2, 0, 1, 1], [1, 1, 1, 1]]
    assert seen.qualities.tolist() == [0.9, 0.5]
    assert seen.excluded.tolist() == [[2, 2, 2, 2]]


def test_the_three_fates_of_a_trial_that_was_not_reported(tmp_path: Path) -> None:
    search = opened(tmp_path)
    reported, stored, slow, lost = (
        search.ask(SPACE, SPACE.configuration(row)) for row in SPACE.all_rows[[3, 10, 20, 40]]
    )
    search.finish(reported, Finished((0.1,)))
    folders = {stored.number: Finished((0.2,)), slow.number: Rejected({"latency": 1.2})}
    again = opened(tmp_path)
    assert again.resume(folders.get) == [lost.number]
    assert len(again) == 2
    repeated = again.ask_again(SPACE)
    assert repeated is not None
    assert repeated.params == lost.params
    assert again.ask_again(SPACE) is None
    again.finish(repeated, Finished((0.3,)))
    assert again.best() == (repeated.number, 0.3)
    assert again.started == 4
    assert opened(tmp_path).resume(folders.get) == []


def test_a_lost_trial_is_repeated_once_however_often_the_search_is_killed(tmp_path: Path) -> None:
    opened(tmp_path).ask(SPACE, SPACE.configuration(SPACE.all_rows[7]))
    for _ in range(3):
        opened(tmp_path).resume(lambda number: None)
    search = opened(tmp_path)
    assert search.waiting() == 1
    trial = search.ask_again(SPACE)
    assert trial is not None
    assert trial.params == SPACE.configuration(SPACE.all_rows[7])


def step(search: SearchStudy, stop_before_telling: bool = False) -> None:
    trial = search.ask_again(SPACE)
    if trial is None:
        row = propose(SPACE, load, search.observations(SPACE), 3, search.started)
        assert row is not None
        trial = search.ask(SPACE, SPACE.configuration(row))
    if not stop_before_telling:
        search.finish(trial, Finished((quality(trial.params),)))


def test_a_search_that_was_killed_goes_on_as_an_uninterrupted_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = opened(tmp_path / "whole")
    for _ in range(14):
        step(whole)
    for killed in range(14):
        search = opened(tmp_path)
        step(search, stop_before_telling=killed % 2 == 0)
        opened(tmp_path).resume(lambda number: None)
        if killed % 2 == 0:
            step(opened(tmp_path))
    np.testing.assert_array_equal(opened(tmp_path).observations(SPACE).rows, whole.observations(SPACE).rows)


def test_a_quality_that_is_no_number_fails_the_trial_and_its_reason_is_kept() -> None:
    search = SearchStudy(SearchSettings())
    search.finish(search.ask(SPACE, SPACE.configuration(SPACE.all_rows[0])), Finished((float("nan"),)))
    search.fail(search.ask(SPACE, SPACE.configuration(SPACE.all_rows[1])), "RuntimeError: kernel too large")
    search.fail(search.ask(SPACE, SPACE.configuration(SPACE.all_rows[2])), "RuntimeError: kernel too large")
    assert len(search) == 0
    assert search.best() is None
    assert search.reasons() == ["RuntimeError: kernel too large", "its quality is nan"]
    assert len(search.observations(SPACE).excluded) == 3


def test_tpe_searches_a_conditional_space_and_repeats_itself() -> None:
    def run(seed: int) -> list[dict[str, object]]:
        search, asked = SearchStudy(SearchSettings(seed=seed)), []
        while len(search) < 14:
            trial = search.ask_sampler()
            depth = trial.suggest_int("depth", 1, 3)
            widths = [trial.suggest_categorical(f"width{layer}", [8, 16]) for layer in range(depth)]
            asked.append(dict(trial.params))
            if sum(widths) > 40:
                search.reject(trial, Rejected({"latency": sum(widths) / 40}))
            else:
                search.finish(trial, Finished((sum(widths) / 40,), {"latency": sum(widths) / 40}))
        return asked

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize("load_", [1.5, 0.5])
def test_constraints_are_optunas_own(load_: float) -> None:
    search = SearchStudy(SearchSettings())
    search.finish(search.ask(SPACE, SPACE.configuration(SPACE.all_rows[0])), Finished((0.5,), {"latency": load_}))
    assert list(search.study.trials[0].constraints.values()) == [load_ - 1.0]


@pytest.mark.parametrize("cut", [1, 25, -1])
def test_a_journal_whose_last_line_was_torn_by_a_kill_goes_on(tmp_path: Path, cut: int) -> None:
    journal = tmp_path / "study.log"
    search = opened(tmp_path)
    search.finish(search.ask(SPACE, SPACE.configuration(SPACE.all_rows[3])), Finished((0.1,)))
    whole = journal.read_bytes()
    search.ask(SPACE, SPACE.configuration(SPACE.all_rows[5]))
    journal.write_bytes(whole + journal.read_bytes()[len(whole) :][:cut])
    again = opened(tmp_path)
    again.resume(lambda number: None)
    while (trial := again.ask_again(SPACE)) is not None:
        again.finish(trial, Finished((0.2,)))
    again.finish(again.ask(SPACE, SPACE.configuration(SPACE.all_rows[6])), Finished((0.3,)))
    assert opened(tmp_path).best() == again.best()
    assert again.best() is not None


def test_a_lock_that_a_killed_process_left_does_not_hold_up_the_next(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "study.log.lock").symlink_to(tmp_path / "study.log")
    search = opened(tmp_path)
    search.finish(search.ask(SPACE, SPACE.configuration(SPACE.all_rows[3])), Finished((0.1,)))
    assert (tmp_path / "study.log.lock").is_symlink()
    assert len(opened(tmp_path)) == 1


def test_a_kill_while_a_result_is_told_tells_it_once(tmp_path: Path) -> None:
    search = opened(tmp_path)
    trial = search.ask(SPACE, SPACE.configuration(SPACE.all_rows[3]))
    trial.report(0.4, 0)
    again = opened(tmp_path)
    again.resume({0: Finished((0.4, 0.6))}.get)
    assert again.study.trials[0].intermediate_values == {0: 0.4, 1: 0.6}
    assert again.best() == (0, 0.6)
