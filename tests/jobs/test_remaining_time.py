from __future__ import annotations

from pathlib import Path

import pytest

from omgoptim.jobs.progress import GRID, RemainingTime, interpolate, read_shares, shares_file, store_shares


def test_without_earlier_runs_time_follows_the_fraction() -> None:
    run = RemainingTime(began=100.0)
    assert run.left(101.0) is None
    run.report(0.25, now=110.0)
    assert run.left(110.0) == pytest.approx(30.0)


def test_the_estimate_counts_down_between_reports_and_never_grows_by_itself() -> None:
    run = RemainingTime(began=0.0)
    run.report(0.5, now=10.0)
    seen = [run.left(now) for now in (10.0, 14.0, 19.0, 20.5, 500.0)]
    assert seen == [10.0, 6.0, 1.0, None, None]
    run.report(0.5, now=600.0)  # the same fraction again is no news
    assert run.left(600.0) is None


def test_a_finished_run_has_nothing_left() -> None:
    run = RemainingTime(began=0.0)
    run.report(1.0, now=10.0)
    assert run.left(10.0) == 0.0


def test_a_fraction_means_the_share_of_time_that_earlier_runs_had_passed_at_it(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "shares.json"
    first = RemainingTime(began=0.0)
    first.report(0.5, now=90.0)  # the first half of the fractions took nine tenths of the time
    assert first.finished(now=100.0) is None  # one report is no curve
    first.report(0.75, now=95.0)
    shares = first.finished(now=100.0)
    assert shares is not None
    store_shares(file, "prune structured", shares)
    second = RemainingTime(0.0, read_shares(file, "prune structured"))
    second.report(0.5, now=9.0)
    assert second.left(9.0) == pytest.approx(1.0)
    assert read_shares(file, "prune magnitude") == GRID


def test_the_newest_run_moves_the_mean_and_does_not_replace_it(tmp_path: Path) -> None:
    file = tmp_path / "shares.json"
    store_shares(file, "k", [0.0] * 20 + [1.0])
    store_shares(file, "k", [1.0] * 21)
    assert read_shares(file, "k")[0] == pytest.approx(0.3)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"k": 3}', '{"k": [0.5, 0.1]}', '{"k": ["a"]}', "[" * 100_000])
def test_a_damaged_file_of_shares_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "shares.json"
    file.write_text(text)
    assert read_shares(file, "k") == GRID


def test_a_cache_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store_shares(tmp_path / "file" / "shares.json", "k", GRID)
    store_shares(None, "k", GRID)


def test_waiting_for_another_run_is_left_out_of_the_account() -> None:
    run = RemainingTime(began=0.0)
    run.report(0.5, now=10.0)
    run.postpone(100.0)
    assert run.left(110.0) == 10.0


def test_interpolation_is_the_line_through_its_points() -> None:
    assert interpolate(0.25, (0.0, 0.5, 1.0), (0.0, 0.8, 1.0)) == pytest.approx(0.4)
    assert interpolate(2.0, (0.0, 1.0), (0.0, 1.0)) == 1.0


def test_the_cache_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMGOPTIM_CACHE_DIR", str(tmp_path))
    assert shares_file() == tmp_path / "time_shares.json"
    monkeypatch.setenv("OMGOPTIM_CACHE_DIR", "relative")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shares_file() == tmp_path / ".cache" / "omgoptim" / "time_shares.json"
