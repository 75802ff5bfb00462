"""The ledger: appended to, read again, cut where a kill tore it, and reduced to its Pareto front."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from omgoptim.errors import RunError
from omgoptim.operations.ledger import Amounts, Ledger, LedgerEntry, key_of

DECISIVE: dict[str, Any] = {
    "parent": "sha256:a",
    "step": "prune",
    "settings": {"ratio": 0.5, "targets": ["conv1"]},
    "data": "sha256:d",
    "engine": "onnxruntime 1.32.0",
    "seed": 0,
}


def entry(
    latency: float | None = 1.0, size: int = 10, drop: float = 0.0, step: str = "prune", **more: Any
) -> LedgerEntry:
    settings = {"at": [latency, size, drop], **more.pop("settings", {})}
    key = key_of(**(DECISIVE | {"step": step, "settings": settings}))
    measured = Amounts(latency_ms=latency, size_bytes=size, quality_drop=drop)
    return LedgerEntry(
        key=key,
        parent="sha256:a",
        step=step,
        settings=settings,
        measured=measured,
        verdict=more.pop("verdict", "kept"),
        **more,
    )


def test_an_entry_is_found_by_its_key_after_the_file_is_opened_again(tmp_path: Path) -> None:
    written = entry(seconds=3.5, why="it pays", predicted=Amounts(speedup=2.0))
    Ledger(tmp_path / "ledger.jsonl").append(written)
    assert Ledger(tmp_path / "ledger.jsonl").get(written.key) == written
    assert Ledger(tmp_path / "ledger.jsonl").get(key_of(**DECISIVE)) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"parent": "sha256:b"},
        {"step": "quantize"},
        {"settings": {"ratio": 0.6, "targets": ["conv1"]}},
        {"data": "sha256:e"},
        {"engine": "onnxruntime 1.33.0"},
        {"seed": 1},
    ],
)
def test_whatever_decides_a_result_changes_the_key(changed: dict[str, Any]) -> None:
    assert key_of(**(DECISIVE | changed)) != key_of(**DECISIVE)


def test_the_order_of_settings_does_not_change_the_key() -> None:
    turned = dict(reversed(DECISIVE["settings"].items()))
    assert key_of(**(DECISIVE | {"settings": turned})) == key_of(**DECISIVE)


def test_settings_that_are_not_json_have_no_key() -> None:
    with pytest.raises(ValueError, match="JSON"):
        key_of(**(DECISIVE | {"settings": {"ratio": float("nan")}}))


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_last_line_is_passed_over_and_cut_off_by_the_next_entry(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "ledger.jsonl"
    first, second, third = entry(1.0), entry(2.0), entry(3.0)
    ledger = Ledger(path)
    ledger.append(first)
    whole = path.read_bytes()
    ledger.append(second)
    torn = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + torn[:cut])
    again = Ledger(path)
    assert list(again) == [first]
    again.append(third)
    assert list(Ledger(path)) == [first, third]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(entry())
    path.write_bytes(b'{"key": 1}\n' + path.read_bytes())
    with pytest.raises(RunError, match="line 1"):
        Ledger(path)


def test_a_writer_that_is_killed_loses_nothing_that_it_had_appended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = f"""
import os, signal
from pathlib import Path
from omgoptim.operations.ledger import LedgerEntry, Ledger, key_of
ledger = Ledger(Path({str(path)!r}))
for seed in range(3):
    key = key_of(parent="a", step="s", settings={{}}, data="d", engine="e", seed=seed)
    ledger.append(LedgerEntry(key=key, parent="a", step="s", verdict="kept"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9
    assert len(Ledger(path)) == 3


def test_the_latest_entry_of_a_key_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    kept = entry()
    rolled_back = kept.model_copy(update={"verdict": "rolled_back"})
    ledger.append(kept)
    ledger.append(rolled_back)
    assert ledger.get(kept.key) == rolled_back
    assert len(ledger) == 2


def test_an_entry_refuses_a_number_that_is_none() -> None:
    with pytest.raises(ValidationError):
        Amounts(latency_ms=float("nan"))
