"""Screening: one launch and a few samples per candidate, to select the finalists."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omgoptim.errors import ArtifactError, OmgoptimError
from omgoptim.measure.builtin_metrics import Metric
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.quality import StoredOutputs, agreement_of_outputs, compare_quality, read_outputs, score
from omgoptim.measure.timing import SCREENING_PLAN, Timing, time_artifacts
from omgoptim.models.manifest import Manifest
from omgoptim.models.samples import Samples
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.build_candidates import BuiltCandidate
from omgoptim.operations.reference_outputs import metric_of
from omgoptim.operations.verdict import drop_with_margin, holds
from omgoptim.reports import Candidate
from omgoptim.requests import QuantizeRequest
from omgoptim.runtimes.engine import Kernel

MAX_CONCURRENT_BYTES = 2_000_000_000
"""Maximum total size of artifacts whose processes run at the same time, to bound memory. Chosen for machines with 8
GB."""

SPAN = (0.35, 0.55)
"""Fractions of the run's progress at which screening starts and ends. Chosen: for display only."""


@dataclass(slots=True, eq=False)
class CandidateResult:
    """Screening result of one candidate."""

    built: BuiltCandidate
    timing: Timing | None = None
    quality: float | None = None
    drop: float | None = None
    """Quality drop on the selection samples: the original's quality less the candidate's."""
    high: float = math.inf
    """Upper end of the 95 % interval of the drop; infinite where unknown."""
    outputs: StoredOutputs | None = None
    """Outputs on the selection samples."""
    ruined: tuple[str, ...] = ()
    """Ruined outputs that the metric does not read; see `Quality.ruined`."""
    error: OmgoptimError | None = None
    status: Literal["chosen", "finalist", "dropped", "failed"] = "dropped"
    why: str = ""
    reference: bool = False
    """True for a float32 reference, which shows the gain of the engine alone."""
    kernels: list[Kernel] = field(default_factory=list)
    """Kernels that its engine ran in the final measurement, with their compute precision."""

    @property
    def name(self) -> str:
        """Name in reports, such as `static on openvino`."""
        return self.built.spec.name

    @property
    def artifact(self) -> Path:
        """Folder of its artifact.

        Raises:
            ArtifactError: it could not be built.
        """
        if self.built.folder is None:
            raise ArtifactError(f"candidate {self.name} has no artifact")
        return self.built.folder

    @property
    def speedup(self) -> float:
        """Speedup over the original; 0 where it was not measured."""
        return self.timing.speedup.value if self.timing and self.timing.speedup else 0.0

    def cautious_drop(self, guard: float) -> float:
        """Return the drop plus a margin for the uncertainty of few samples; infinite where unknown."""
        return math.inf if self.drop is None else drop_with_margin(self.drop, self.high, guard)


@dataclass(frozen=True, slots=True)
class ScreeningReference:
    """Selection samples, metric, and the original's outputs, to evaluate candidates with."""

    inputs: Path
    """Folder of the samples, a file per batch."""
    targets: list[Any]
    metric: Metric
    original: StoredOutputs
    quality: float
    """Quality of the original."""
    samples: int

    @staticmethod
    def of(loaded: LoadedModel, samples: Samples, inputs: Path, outputs: Path, limit_s: float) -> ScreeningReference:
        """Return the reference on samples that the original was run on.

        `inputs` and `outputs` are the folders of the samples and of the outputs of the original for them.

        Raises:
            OmgoptimError: the original cannot be scored.
        """
        original = read_outputs(outputs)
        metric = metric_of(loaded, original, samples.targets, limit_s)
        quality = score(metric, original, samples.targets, original)
        return ScreeningReference(inputs, samples.targets, metric, original, quality, samples.count)

    def evaluate(self, result: CandidateResult, outputs: StoredOutputs) -> None:
        """Record the quality of these outputs and its drop against the original on the same samples."""
        result.outputs = outputs
        try:
            if self.metric.per_sample is None:  # an interval would take hundreds of calls of the user's metric
                result.quality = score(self.metric, outputs, self.targets, self.original)
            else:
                compared = compare_quality(self.metric, self.original, outputs, self.targets, 0)
                result.quality, result.high = compared.after, compared.high
            result.drop = self.quality - result.quality
            found = agreement_of_outputs(self.metric, outputs, self.original)
            result.ruined = tuple(output.spec.name for output in found if output.lost)
        except OmgoptimError as error:  # infinite outputs, or a metric that is NaN for them
            result.error = error


def screen(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    results: list[CandidateResult],
    selection: Samples,
) -> ScreeningReference | None:
    """Screen candidates with one launch each on the selection samples.

    Candidates that could be built get their times and drops; `selection` has no calibration samples.

    Returns:
        The reference to evaluate further candidates with; None if there was nothing to screen.
    """
    inputs = selection.write(context.work / "selection")
    screened = [result for result in results if result.built.folder]
    done = 0
    screening: ScreeningReference | None = None
    for group in _groups(screened, loaded.baseline):
        progress = SPAN[0] + (SPAN[1] - SPAN[0]) * done / len(screened)
        context.progress(f"screening {len(screened)} candidates", progress)
        targets = [context.work / "screened" / f"{done}-{index}" for index in range(len(group) + 1)]

        def outputs(index: int, process: MeasuringProcess, targets: list[Path] = targets) -> None:
            process.run_samples(inputs, targets[index])

        folders = [loaded.baseline, *(result.built.folder for result in group if result.built.folder)]
        with context.measuring():
            timings = time_artifacts(folders, loaded.bench, SCREENING_PLAN, request.seed, on_first=outputs)
        if not isinstance(timings[0], Timing):  # the original does not run: raise its own error
            raise timings[0]
        screening = ScreeningReference.of(loaded, selection, inputs, targets[0], request.time_limit_s)
        for result, timing, target in zip(group, timings[1:], targets[1:], strict=True):
            if not isinstance(timing, Timing):
                result.error = timing
                continue
            result.timing = timing
            screening.evaluate(result, read_outputs(target))
            context.publish(live_candidate(result))
        done += len(group)
    return screening


def live_candidate(result: CandidateResult) -> Candidate:
    """Return the preliminary record of a candidate."""
    return result.built.spec.record(
        "failed" if result.error else "planned",
        result.error.what if result.error else "screened with one launch" if result.timing else "built",
        size_bytes=result.built.size_bytes,
        speedup=result.speedup or None,
        quality=result.quality,
        quality_drop=result.drop,
    )


def _groups(results: list[CandidateResult], baseline: Path) -> list[list[CandidateResult]]:
    """Group candidates whose processes may run together with the baseline's."""
    each = max(Manifest.read(baseline).size_bytes, 1)
    size = max(1, MAX_CONCURRENT_BYTES // each - 1)
    return [results[start : start + size] for start in range(0, len(results), size)]


def passes_guard(result: CandidateResult, guard: float) -> bool:
    """Return whether a candidate passes the guard on the selection samples and ruins no output."""
    return result.drop is not None and holds(result.drop, guard) and not result.ruined


def passes_guard_with_margin(result: CandidateResult, guard: float) -> bool:
    """Return whether a candidate passes the guard with a margin for the number of samples."""
    return passes_guard(result, guard) and holds(result.cautious_drop(guard), guard)
