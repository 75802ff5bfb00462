"""Trials on disk: a folder per trial with its specification and its result, created atomically by renaming.

trials/
├── 00012/                 finished
│   ├── spec.json
│   ├── result.json
│   └── artifact/ …        whatever the trial left
├── 00013.partial-1f3a/    incomplete, or lost to a kill: never read, removed on resuming
├── 00014.trained/         trained by a task, not measured yet: a resumed search measures it
└── 00015.tmp-1/           a task's first attempt
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omgoptim.architecture_search.space import Option
from omgoptim.architecture_search.study import Finished, Rejected
from omgoptim.errors import OmgoptimError, RunError
from omgoptim.models.security.file_integrity import read_regular_file

MOST_BYTES = 2**20
"""Limit of a trial's JSON files, 1 MiB: far above what a trial writes, against memory exhaustion."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TrialSpec(_Frozen):
    """Specification of a trial, which determines its result."""

    number: int = Field(ge=0)
    configuration: dict[str, Option]
    seed: int
    parent: str
    """Identity of the model that it starts from."""
    data: str
    """Identity of the data."""
    epochs: int = Field(ge=1)
    """Epochs of a complete training."""


class TrialResult(_Frozen):
    """Outcome of a trial."""

    outcome: Literal["trained", "stopped", "rejected", "failed"]
    """Trained to the end, stopped by successive halving, too slow or large to be trained, or ended by an error."""
    rungs: tuple[float, ...] = ()
    """Quality on the selection samples at each rung that it reached."""
    loads: dict[str, float] = {}
    """Measured cost over its limit, by constraint."""
    predicted_ms: float | None = None
    measured_ms: float | None = None
    size_bytes: int | None = None
    seconds: float = Field(0.0, ge=0)
    reason: str = ""

    def for_study(self) -> Finished | Rejected | str:
        """Return the result for `Search`; the reason, for a trial that failed."""
        if self.outcome == "failed":
            return self.reason
        if self.outcome == "rejected":
            return Rejected(self.loads)
        return Finished(self.rungs, self.loads, complete=self.outcome == "trained")


class TrialFolders:
    """Folders of a search's trials."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        """Return where a trial's finished folder is, or will be."""
        return self.root / f"{number:05d}"

    def result(self, number: int) -> TrialResult | None:
        """Return the result of a trial; None when it has no finished folder.

        Raises:
            RunError: its result is damaged.
        """
        file = self.path(number) / "result.json"
        if not file.exists():
            return None
        try:
            return TrialResult.model_validate_json(read_regular_file(file, MOST_BYTES))
        except (ValidationError, ValueError) as error:
            raise RunError(f"the result of trial {number} is damaged", str(error)[:300]) from error

    def spec(self, number: int) -> TrialSpec:
        """Return the specification of a finished trial.

        Raises:
            RunError: there is none, or it is damaged.
        """
        try:
            return TrialSpec.model_validate_json(read_regular_file(self.path(number) / "spec.json", MOST_BYTES))
        except (OSError, ValidationError, ValueError) as error:
            raise RunError(f"the spec of trial {number} is missing or damaged", str(error)[:300]) from error

    def results(self) -> dict[int, TrialResult]:
        """Return the results of all finished trials, by number.

        Raises:
            RunError: one is damaged.
        """
        numbers = sorted(int(folder.name) for folder in self.root.iterdir() if folder.name.isdecimal())
        return {number: found for number in numbers if (found := self.result(number)) is not None}

    def histories(self) -> dict[int, tuple[float, ...]]:
        """Return the qualities at each rung of the trials that were trained, by number."""
        return {number: found.rungs for number, found in self.results().items() if found.rungs}

    def run(self, spec: TrialSpec, trial: Callable[[TrialSpec, Path], TrialResult]) -> TrialResult:
        """Run a trial in a folder that appears with its result; one that is there is not run again.

        Args:
            spec: number, configuration and identities of the trial.
            trial: `trial(spec, folder)`; what it writes into the folder stays. An OmgoptimError that it raises is the
                result of a failed trial.
        """
        done = self.result(spec.number)
        if done is not None:
            return done
        partial = self.root / f"{spec.number:05d}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        began = time.monotonic()
        try:
            try:
                result = trial(spec, partial)
            except OmgoptimError as error:
                result = TrialResult(outcome="failed", reason=error.reason)
            seconds = result.seconds or time.monotonic() - began  # of a task, its own
            result = result.model_copy(update={"seconds": seconds})
            _write(partial / "spec.json", spec.model_dump_json(indent=1))
            _write(partial / "result.json", result.model_dump_json(indent=1))
            os.replace(partial, self.path(spec.number))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return result

    def clear(self) -> int:
        """Remove incomplete folders of killed trials; return their number."""
        lost = [*self.root.glob("*.partial-*"), *self.root.glob("*.tmp-*")]
        for folder in lost:
            shutil.rmtree(folder, ignore_errors=True)
        return len(lost)


def _write(file: Path, text: str) -> None:
    with open(file, "w", encoding="utf-8") as target:
        target.write(text)
        target.flush()
        os.fsync(target.fileno())
