"""Screening: one launch and a few samples per candidate, enough to drop what is hopeless and to name the finalists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.launch import Process
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import Metric, StoredOutputs, agreement_of_outputs, read_outputs, score
from omgoptim.measure.race import SCREENING, Timing, race
from omgoptim.models.artifact import Manifest
from omgoptim.models.samples import Samples
from omgoptim.operations.context import RunContext
from omgoptim.operations.making import Made
from omgoptim.operations.subject import Subject
from omgoptim.operations.verdict import holds
from omgoptim.requests import QuantizeRequest

FINALISTS = 3
NEAR_THE_BEST = 1.25
"""A candidate screened within this factor of the fastest may still be the fastest: screening is one launch."""

TOGETHER_BYTES = 2_000_000_000
"""Most bytes of artifacts whose processes are alive at the same time during screening."""


@dataclass(slots=True)
class Attempt:
    """One candidate on its way through the screening."""

    made: Made
    timing: Timing | None = None
    quality: float | None = None
    drop: float | None = None
    """Quality on the selection samples, and how much less it is than the original's."""
    outputs: StoredOutputs | None = None
    """What it gave on the selection samples."""
    ruined: tuple[str, ...] = ()
    """Outputs that the metric never reads and that are lost; see `Quality.ruined`."""
    error: OmgoptimError | None = None
    status: Literal["chosen", "finalist", "dropped", "failed"] = "dropped"
    why: str = ""

    @property
    def speedup(self) -> float:
        return self.timing.speedup.value if self.timing and self.timing.speedup else 0.0


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What a candidate's quality is measured with: the selection samples, and what the original gives for them."""

    inputs: Path
    """Folder of the samples, a file per batch."""
    targets: list[Any]
    metric: Metric
    original: StoredOutputs
    quality: float
    """The original's."""
    samples: int

    def judge(self, attempt: Attempt, outputs: StoredOutputs) -> None:
        """Note the quality of these outputs, and how much less it is than the original's on the same samples."""
        attempt.outputs = outputs
        try:
            attempt.quality = score(self.metric, outputs, self.targets, self.original)
            attempt.drop = self.quality - attempt.quality
            found = agreement_of_outputs(self.metric, outputs, self.original)
            attempt.ruined = tuple(output.spec.name for output in found if output.ruined and not output.read)
        except OmgoptimError as error:  # infinite outputs, or a metric that is NaN for them
            attempt.error = error


def screen(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    attempts: list[Attempt],
    selection: Samples,
    name: str = "screened",
    span: tuple[float, float] = (0.35, 0.55),
) -> Yardstick | None:
    """One launch each, few turns, the selection samples: enough to drop what is hopeless.

    Args:
        name: of the folder for what the candidates give.
        span: fractions of the whole run between which progress moves.

    Returns:
        What other candidates' quality can be measured with; None if there was nothing to screen.
    """
    inputs = selection.write(context.work / "selection")
    screened = [attempt for attempt in attempts if attempt.made.folder]
    done = 0
    yardstick: Yardstick | None = None
    for group in _groups(screened, subject.baseline):
        progress = span[0] + (span[1] - span[0]) * done / len(screened)
        context.progress(f"screening {len(screened)} candidates", progress)
        targets = [context.work / name / f"{done}-{index}" for index in range(len(group) + 1)]

        def outputs(index: int, process: Process, targets: list[Path] = targets) -> None:
            process.run_samples(inputs, targets[index])

        folders = [subject.baseline, *(attempt.made.folder for attempt in group if attempt.made.folder)]
        with context.measuring():
            timings = race(folders, subject.bench, SCREENING, request.seed, on_first=outputs)
        original = read_outputs(targets[0])
        metric = resolve_metric(
            subject.metric,
            subject.signature,
            original,
            selection.targets,
            subject.reach,
            request.time_limit_s,
            subject.outputs,
        )
        original_quality = score(metric, original, selection.targets, original)  # failing here fails the run
        yardstick = Yardstick(inputs, selection.targets, metric, original, original_quality, selection.count)
        for attempt, timing, target in zip(group, timings[1:], targets[1:], strict=True):
            if not isinstance(timing, Timing):
                attempt.error = timing
                continue
            attempt.timing = timing
            yardstick.judge(attempt, read_outputs(target))
        done += len(group)
    return yardstick


def _groups(attempts: list[Attempt], baseline: Path) -> list[list[Attempt]]:
    """Candidates whose processes may be alive together with the baseline's."""
    each = max(Manifest.read(baseline).size_bytes, 1)
    size = max(1, TOGETHER_BYTES // each - 1)
    return [attempts[start : start + size] for start in range(0, len(attempts), size)]


def within(attempt: Attempt, guard: float) -> bool:
    return attempt.drop is not None and holds(attempt.drop, guard) and not attempt.ruined


def choose_finalists(attempts: list[Attempt], guard: float) -> list[Attempt]:
    """The fastest few that hold the guard on the selection samples; if none does, the one that comes closest."""
    for attempt in attempts:
        if attempt.error is not None:
            attempt.status, attempt.why = "failed", f"{attempt.error.what}: {attempt.error.why}".strip(": ")
    alive = [attempt for attempt in attempts if attempt.timing and attempt.drop is not None]
    if not alive:
        reasons = "; ".join(f"{attempt.made.option.name}: {attempt.why}" for attempt in attempts)
        raise TechniqueError("no candidate could be measured", reasons)
    holding = sorted((a for a in alive if within(a, guard)), key=lambda a: -a.speedup)
    if not holding:
        finalists = [min(alive, key=lambda a: (bool(a.ruined), a.drop or 0.0, -a.speedup))]
    else:
        best = holding[0].speedup
        finalists = [a for a in holding if a.speedup * NEAR_THE_BEST >= best][:FINALISTS]
    for attempt in alive:
        if attempt in finalists:
            attempt.status = "finalist"
        elif attempt.ruined:
            attempt.why = f"output {', '.join(attempt.ruined)} was ruined on the selection samples"
        elif not within(attempt, guard):
            attempt.why = f"quality drop {attempt.drop:.4f} on the selection samples is above the guard {guard:g}"
        else:
            attempt.why = f"{attempt.speedup / holding[0].speedup:.0%} of the speed of the best in the screening"
    return finalists
