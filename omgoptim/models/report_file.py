"""Reading and writing of a run's report with its seal. No torch."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path

from omgoptim.models.security.file_integrity import add_seal, can_seal, is_sealed, read_plain
from omgoptim.reports import EfficiencyReport

MAX_REPORT_BYTES = 256 * 2**20
"""Limit of a report from an untrusted folder: 256 MiB."""
MAX_SEAL_BYTES = 10_000
"""Limit of a seal, a small JSON object."""
MAX_NUMBER = 1e30
"""No count, size or time of a report is as large."""


def read_report(file: Path, run: str) -> tuple[EfficiencyReport, bool] | None:
    """Read a report, and whether this user's run of that id wrote it; None if none can be read.

    Where no key can be kept, nothing is sealed and a report is taken for the user's own.
    """
    try:
        text = read_plain(file, MAX_REPORT_BYTES)
        report = EfficiencyReport.model_validate_json(text)
        own = _is_own(file, run, text)
        if not own:
            json.loads(text, parse_constant=_refuse_number, parse_float=_number, parse_int=_number)
    except (OSError, ValueError, RecursionError):
        return None
    return report, own or not can_seal()


def _number(text: str) -> float:
    """Parse a number of an untrusted report; refuse one that no measurement gives."""
    value = float(text)
    return value if abs(value) < MAX_NUMBER else _refuse_number(text)


def _refuse_number(text: str) -> float:
    raise ValueError(f"it contains the number {text[:40]}, which no report contains")


def seal_report(file: Path, run: str, text: str) -> None:
    """Write the seal of a report whose text is about to be written to `file`."""
    record = add_seal("report", _named(file, run, text.encode()))
    partial = file.with_name(f".{file.name}.seal.{secrets.token_hex(4)}.tmp")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(_seal_of(file))


def write_sealed(file: Path, run: str, report: EfficiencyReport) -> None:
    """Write a report and its seal, not atomically: for a folder without concurrent readers."""
    text = report.model_dump_json(indent=2)
    seal_report(file, run, text)
    file.write_text(text, encoding="utf-8")


def _is_own(file: Path, run: str, text: bytes) -> bool:
    try:
        record = json.loads(read_plain(_seal_of(file), MAX_SEAL_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    named = _named(file, run, text)
    return isinstance(record, dict) and named.items() <= record.items() and is_sealed("report", record)


def _named(file: Path, run: str, text: bytes) -> dict[str, str]:
    """Return the sealed content, with the ids of run and finalist, so that no report stands for another."""
    return {"run": run, "name": file.name, "sha256": hashlib.sha256(text).hexdigest()}


def _seal_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.seal")
