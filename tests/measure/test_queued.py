"""Time in the queue of a core, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

from omgoptim.measure.queued import queued_s


def test_the_time_of_all_threads_is_added_and_a_file_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    for thread, text in (("1", "7000 2000000000 5\n"), ("2", "0 500000000 1\n"), ("3", "ended")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(text)
    assert queued_s(tmp_path) == 2.5


def test_a_system_that_does_not_tell_gives_none(tmp_path: Path) -> None:
    assert queued_s(tmp_path) is None
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "schedstat").write_text("0 0 0\n")
    assert queued_s(tmp_path) is None
