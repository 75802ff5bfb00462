"""Reading and writing of a run's report with its HMAC. No torch."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path

from omgoptim.models.security.file_integrity import can_sign, is_signed, read_regular_file, sign_record
from omgoptim.reports import EfficiencyReport

MAX_REPORT_BYTES = 256 * 2**20
"""Limit of a report from an untrusted folder: 256 MiB. Chosen: far above a real one, below what exhausts memory."""
MAX_HMAC_BYTES = 10_000
"""Limit of an HMAC file, a small JSON object."""
MAX_NUMBER = 1e30
"""No count, size or time of a report is as large."""


def read_report(file: Path, run: str) -> tuple[EfficiencyReport, bool] | None:
    """Read a report, and whether this user's run of that id wrote it; None if none can be read.

    Where no key can be kept, nothing is signed and a report is taken for the user's own.
    """
    try:
        text = read_regular_file(file, MAX_REPORT_BYTES)
        report = EfficiencyReport.model_validate_json(text)
        is_own = _is_own(file, run, text)
        if not is_own:
            json.loads(text, parse_constant=_refuse_number, parse_float=_number, parse_int=_number)
    except (OSError, ValueError, RecursionError):
        return None
    return report, is_own or not can_sign()


def _number(text: str) -> float:
    """Parse a number of an untrusted report; refuse one that no measurement gives."""
    value = float(text)
    return value if abs(value) < MAX_NUMBER else _refuse_number(text)


def _refuse_number(text: str) -> float:
    raise ValueError(f"it contains the number {text[:40]}, which no report contains")


def sign_report(file: Path, run: str, text: str) -> None:
    """Write the HMAC of a report whose text is about to be written to `file`."""
    record = sign_record("report", _named(file, run, text.encode()))
    partial = file.with_name(f".{file.name}.seal.{secrets.token_hex(4)}.tmp")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(_hmac_file(file))


def write_signed_report(file: Path, run: str, report: EfficiencyReport) -> None:
    """Write a report and its HMAC, not atomically: for a folder without concurrent readers."""
    text = report.model_dump_json(indent=2)
    sign_report(file, run, text)
    file.write_text(text, encoding="utf-8")


def _is_own(file: Path, run: str, text: bytes) -> bool:
    try:
        record = json.loads(read_regular_file(_hmac_file(file), MAX_HMAC_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    named = _named(file, run, text)
    return isinstance(record, dict) and named.items() <= record.items() and is_signed("report", record)


def _named(file: Path, run: str, text: bytes) -> dict[str, str]:
    """Return the signed content, with the ids of run and finalist, so that no report stands for another."""
    return {"run": run, "name": file.name, "sha256": hashlib.sha256(text).hexdigest()}


def _hmac_file(file: Path) -> Path:
    return file.with_name(f".{file.name}.seal")
