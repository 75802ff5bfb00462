"""The candidates of a quantize run, as its report has them."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.operations.finals import Final
from omgoptim.operations.screening import Attempt
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Candidate


def candidate_records(
    attempts: Sequence[Attempt], final: Final, chosen: Attempt, baseline_bytes: int
) -> list[Candidate]:
    """Return the records of all candidates, the chosen one first; float32 that nobody asked for only where it was
    measured.

    Args:
        chosen: the candidate whose report this is; another one than the run's winner is one to pick.
    """
    found = []
    measured = [finalist.attempt for finalist in final.finalists]
    for attempt in sorted(attempts, key=_rank):
        if attempt.reference and attempt not in measured:
            continue
        record = _record(attempt, baseline_bytes, final)
        if attempt is chosen:
            record = record.model_copy(update={"status": "chosen"})
        elif attempt is final.winner.attempt:
            record = record.model_copy(update={"status": "finalist"})
        found.append(record)
    return sorted(found, key=lambda record: record.status != "chosen")


def _record(attempt: Attempt, baseline_bytes: int, final: Final) -> Candidate:
    """A candidate as the report has it; without its speedup if the machine was too busy for one to be told. What was
    only screened is told on the scale of the full measurement: the time of the original cancels out."""
    trusted = final.load <= OVERLOADED
    scale = 1.0 if attempt.status in ("chosen", "finalist") else final.scale
    option, size = attempt.made.option, attempt.made.size_bytes
    return Candidate(
        name=option.name,
        scheme=option.scheme,
        runtime=option.runtime,
        size_bytes=size,
        size_ratio=baseline_bytes / size if size else None,
        speedup=(attempt.speedup * scale or None) if trusted else None,
        quality=attempt.quality,
        quality_drop=attempt.drop,
        status=attempt.status,
        why=attempt.why,
    )


def _rank(attempt: Attempt) -> tuple[int, float]:
    return ("chosen", "finalist", "dropped", "failed").index(attempt.status), -attempt.speedup
