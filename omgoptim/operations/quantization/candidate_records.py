"""Records of the candidates of a quantize run for its report."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.operations.quantization.final_race import FinalRace
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Candidate


def candidate_records(
    results: Sequence[CandidateResult], final: FinalRace, chosen: CandidateResult, baseline_bytes: int
) -> list[Candidate]:
    """Return the records of all candidates, the chosen one first.

    Float32 that the request did not name is listed only where it was measured.

    Args:
        results: all candidates of the run.
        final: the finalists' measurements.
        chosen: the candidate whose report this is; another one than the run's winner is one to pick.
        baseline_bytes: size of the original's artifact.
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


def _record(result: CandidateResult, baseline_bytes: int, final: FinalRace) -> Candidate:
    """Return the report's record of a candidate; without speedup if the machine was overloaded.

    Speedups of screening are rescaled to the final measurement: the time of the original cancels out.
    """
    trusted = final.load <= OVERLOADED
    scale = 1.0 if result.status in ("chosen", "finalist") else final.scale
    spec, size = result.built.spec, result.built.size_bytes
    return Candidate(
        name=spec.name,
        scheme=spec.scheme,
        runtime=spec.runtime,
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
