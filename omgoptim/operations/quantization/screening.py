"""Screening: one launch and a few samples per candidate, enough to drop what is hopeless and to name the finalists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import (
    Metric,
    StoredOutputs,
    agreement_of_outputs,
    compare_quality,
    read_outputs,
    score,
)
from omgoptim.measure.timing import SCREENING_PLAN, Timing, time_artifacts
from omgoptim.models.artifact import Manifest
from omgoptim.models.samples import Samples
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.build_candidates import BuiltCandidate
from omgoptim.operations.verdict import holds, with_margin
from omgoptim.requests import QuantizeRequest

TOGETHER_BYTES = 2_000_000_000
"""Most bytes of artifacts whose processes are alive at the same time during screening."""


@dataclass(slots=True, eq=False)
class CandidateResult:
    """One candidate on its way through the screening."""

    made: BuiltCandidate
    timing: Timing | None = None
    quality: float | None = None
    drop: float | None = None
    """Quality on the selection samples, and how much less it is than the original's."""
    high: float = math.inf
    """Upper end of the 95 % interval of the drop; infinite where it is unknown."""
    outputs: StoredOutputs | None = None
    """What it gave on the selection samples."""
    ruined: tuple[str, ...] = ()
    """Outputs that the metric never reads and that are lost; see `Quality.ruined`."""
    error: OmgoptimError | None = None
    status: Literal["chosen", "finalist", "dropped", "failed"] = "dropped"
    why: str = ""
    reference: bool = False
    """Whether it was not asked for: float32 on an engine, which tells what the engine alone brings."""

    @property
    def speedup(self) -> float:
        return self.timing.speedup.value if self.timing and self.timing.speedup else 0.0

    def cautious_drop(self, guard: float) -> float:
        """The drop with a margin for what the selection samples cannot tell; infinite where it is not known."""
        return math.inf if self.drop is None else with_margin(self.drop, self.high, guard)


@dataclass(frozen=True, slots=True)
class ScreeningReference:
    """What a candidate's quality is measured with: the selection samples, and what the original gives for them."""

    inputs: Path
    """Folder of the samples, a file per batch."""
    targets: list[Any]
    metric: Metric
    original: StoredOutputs
    quality: float
    """The original's."""
    samples: int

    def judge(self, result: CandidateResult, outputs: StoredOutputs) -> None:
        """Note the quality of these outputs, and how much less it is than the original's on the same samples."""
        result.outputs = outputs
        try:
            if self.metric.per_sample is None:  # an interval would take hundreds of calls of the user's metric
                result.quality = score(self.metric, outputs, self.targets, self.original)
            else:
                compared = compare_quality(self.metric, self.original, outputs, self.targets, 0)
                result.quality, result.high = compared.after, compared.high
            result.drop = self.quality - result.quality
            found = agreement_of_outputs(self.metric, outputs, self.original)
            result.ruined = tuple(output.spec.name for output in found if output.ruined and not output.read)
        except OmgoptimError as error:  # infinite outputs, or a metric that is NaN for them
            result.error = error


def screen(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    results: list[CandidateResult],
    selection: Samples,
    name: str = "screened",
    span: tuple[float, float] = (0.35, 0.55),
) -> ScreeningReference | None:
    """One launch each, few turns, the selection samples: enough to drop what is hopeless.

    Args:
        name: of the folder for what the candidates give.
        span: fractions of the whole run between which progress moves.

    Returns:
        What other candidates' quality can be measured with; None if there was nothing to screen.
    """
    inputs = selection.write(context.work / "selection")
    screened = [result for result in results if result.made.folder]
    done = 0
    screening: ScreeningReference | None = None
    for group in _groups(screened, loaded.baseline):
        progress = span[0] + (span[1] - span[0]) * done / len(screened)
        context.progress(f"screening {len(screened)} candidates", progress)
        targets = [context.work / name / f"{done}-{index}" for index in range(len(group) + 1)]

        def outputs(index: int, process: MeasuringProcess, targets: list[Path] = targets) -> None:
            process.run_samples(inputs, targets[index])

        folders = [loaded.baseline, *(result.made.folder for result in group if result.made.folder)]
        with context.measuring():
            timings = time_artifacts(folders, loaded.bench, SCREENING_PLAN, request.seed, on_first=outputs)
        if not isinstance(timings[0], Timing):  # the original does not run: its own error, not what follows from it
            raise timings[0]
        original = read_outputs(targets[0])
        metric = resolve_metric(
            loaded.metric,
            loaded.signature,
            original,
            selection.targets,
            loaded.policy,
            request.time_limit_s,
            loaded.outputs,
        )
        original_quality = score(metric, original, selection.targets, original)  # failing here fails the run
        screening = ScreeningReference(inputs, selection.targets, metric, original, original_quality, selection.count)
        for result, timing, target in zip(group, timings[1:], targets[1:], strict=True):
            if not isinstance(timing, Timing):
                result.error = timing
                continue
            result.timing = timing
            screening.judge(result, read_outputs(target))
        done += len(group)
    return screening


def _groups(results: list[CandidateResult], baseline: Path) -> list[list[CandidateResult]]:
    """Candidates whose processes may be alive together with the baseline's."""
    each = max(Manifest.read(baseline).size_bytes, 1)
    size = max(1, TOGETHER_BYTES // each - 1)
    return [results[start : start + size] for start in range(0, len(results), size)]


def within(result: CandidateResult, guard: float) -> bool:
    """Whether a candidate holds the guard on the selection samples, and ruins no output."""
    return result.drop is not None and holds(result.drop, guard) and not result.ruined


def within_safely(result: CandidateResult, guard: float) -> bool:
    """Whether a candidate holds the guard with the margin that its number of selection samples asks for."""
    return within(result, guard) and holds(result.cautious_drop(guard), guard)
