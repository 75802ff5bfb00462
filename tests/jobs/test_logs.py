from __future__ import annotations

from pathlib import Path

from omgoptim.jobs.storage import log_tail, trim_log


def test_the_tail_is_bounded_in_lines_and_characters(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {i}\n" for i in range(10_000)))
    assert log_tail(log, lines=2) == "line 9998\nline 9999"
    log.write_text("x" * 100_000)
    assert len(log_tail(log, characters=100)) <= 102
    assert log_tail(tmp_path / "none") == ""
    log.write_bytes(b"\x1b[31mred\x1b[0m\nbell \x07\r\n\n")
    assert log_tail(log) == "red\nbell \\x07"


def test_a_log_that_grew_too_large_keeps_its_end_and_whoever_writes_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"a" * 1000 + b"the end\n")
        trim_log(log, largest=500, kept=8)
        writer.write(b"more\n")
        trim_log(log, largest=500, kept=8)
    assert log.read_bytes().endswith(b"removed]\nthe end\nmore\n")
    assert log.stat().st_size < 200
