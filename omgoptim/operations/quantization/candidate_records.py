"""The candidates of a quantize run, as its report has them."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.operations.quantization.final_race import Final
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Candidate


def candidate_records(
    results: Sequence[CandidateResult], final: Final, chosen: CandidateResult, baseline_bytes: int
) -> list[Candidate]:
    """Return the records of all candidates, the chosen one first; float32 that nobody asked for only where it was
    measured.

    Args:
        chosen: the candidate whose report this is; another one than the run's winner is one to pick.
    """
    found = []
    measured = [finalist.result for finalist in final.finalists]
    for result in sorted(results, key=_rank):
        if result.reference and result not in measured:
            continue
        record = _record(result, baseline_bytes, final)
        if result is chosen:
            record = record.model_copy(update={"status": "chosen"})
        elif result is final.winner.result:
            record = record.model_copy(update={"status": "finalist"})
        found.append(record)
    return sorted(found, key=lambda record: record.status != "chosen")


def _record(result: CandidateResult, baseline_bytes: int, final: Final) -> Candidate:
    """A candidate as the report has it; without its speedup if the machine was too busy for one to be told. What was
    only screened is told on the scale of the full measurement: the time of the original cancels out."""
    trusted = final.load <= OVERLOADED
    scale = 1.0 if result.status in ("chosen", "finalist") else final.scale
    option, size = result.made.option, result.made.size_bytes
    return Candidate(
        name=option.name,
        scheme=option.scheme,
        runtime=option.runtime,
        size_bytes=size,
        size_ratio=baseline_bytes / size if size else None,
        speedup=(result.speedup * scale or None) if trusted else None,
        quality=result.quality,
        quality_drop=result.drop,
        status=result.status,
        why=result.why,
    )


def _rank(result: CandidateResult) -> tuple[int, float]:
    return ("chosen", "finalist", "dropped", "failed").index(result.status), -result.speedup
