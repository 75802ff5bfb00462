"""Append-only ledger of a run: one line of JSON per step or trial.

The key of an entry is a hash of the inputs of its result, so the ledger serves as cache, as state to resume from, and
as record of the decisions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omgoptim.errors import RunError

MOST_BYTES = 64 * 2**20
"""Maximum size of a ledger that is read; thousands of entries take a few MiB."""

Verdict = Literal["kept", "rolled_back", "pruned", "failed"]
"""Result of a step or trial: kept, measured and not kept, stopped early or too slow, or ended by an error."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Amounts(_Line):
    """Predicted or measured quantities of a step; None where unknown."""

    latency_ms: float | None = Field(None, ge=0)
    """Median of one call at the run's batch size."""
    speedup: float | None = Field(None, gt=0)
    """Latency of the original over this one's, in one race."""
    size_bytes: int | None = Field(None, ge=0)
    """Size of the artifact's file."""
    quality: float | None = None
    """Quality on the selection samples; higher is better."""
    quality_drop: float | None = None
    """Quality of the original minus this one's, on the selection samples."""


class LedgerEntry(_Line):
    """A step or trial."""

    key: str = Field(pattern="^[0-9a-f]{64}$")
    """From `key_of`."""
    parent: str
    """Identity of the artifact that the step started from."""
    step: str = Field(min_length=1)
    """Verb or trial: quantize, prune, search trial."""
    settings: dict[str, Any] = {}
    """Arguments of the step."""
    predicted: Amounts = Amounts()
    measured: Amounts = Amounts()
    seconds: float = Field(0.0, ge=0)
    """Duration of the step."""
    verdict: Verdict
    why: str = ""
    """The reason for the verdict, as text."""
    artifact: str | None = None
    """The artifact's folder, relative to the run; None when none was saved."""


def key_of(*, parent: str, step: str, settings: dict[str, Any], data: str, engine: str, seed: int) -> str:
    """Hash the inputs of a step's result.

    Args:
        parent: identity of the artifact that the step starts from.
        step: the verb.
        settings: plain JSON values.
        data: identity of the data.
        engine: name and version of the engine, since versions differ in their results.
        seed: of the run.

    Raises:
        TypeError, ValueError: the settings are not plain JSON.
    """
    decisive = {"parent": parent, "step": step, "settings": settings, "data": data, "engine": engine, "seed": seed}
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """The entries of a file, in order, with the latest of each key; written by one process.

    Raises:
        RunError: the file is not a ledger, or one of its lines but the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[LedgerEntry] = []
        self._by_key: dict[str, LedgerEntry] = {}
        whole = 0
        for entry, end in _read(path):
            self._add(entry)
            whole = end
        self._whole = whole

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[LedgerEntry]:
        return iter(tuple(self._entries))

    def get(self, key: str) -> LedgerEntry | None:
        """Return the latest entry of a key; None when that step was never finished."""
        return self._by_key.get(key)

    def append(self, entry: LedgerEntry) -> None:
        """Write an entry and wait until it is on disk; an incomplete last line is removed first."""
        line = (entry.model_dump_json(exclude_defaults=True) + "\n").encode()
        with open(self.path, "ab") as file:
            if file.tell() > self._whole:
                file.truncate(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self._add(entry)

    def _add(self, entry: LedgerEntry) -> None:
        self._entries.append(entry)
        self._by_key[entry.key] = entry


def _read(path: Path) -> Iterator[tuple[LedgerEntry, int]]:
    """Yield each entry with the offset of its end; an incomplete last line, after a kill, is skipped."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return
    if len(data) > MOST_BYTES:
        raise RunError(f"the ledger '{path.name}' is too large", f"more than {MOST_BYTES:,} bytes")
    end = 0
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        end += len(line)
        if not line.endswith(b"\n"):
            return
        try:
            yield LedgerEntry.model_validate_json(line), end
        except ValidationError as error:
            raise RunError(
                f"line {number} of the ledger '{path.name}' is damaged",
                str(error.errors()[0]["msg"]),
                "restore the file, or start a new run",
            ) from error
