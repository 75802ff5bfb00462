"""Attribution of a gain to the engine, to precision, to waiting of the original, or to earlier runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.measure.timing import Timing, t_interval
from omgoptim.models.manifest import Manifest
from omgoptim.models.report_file import read_report
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import RUNS, find_artifact
from omgoptim.operations.context import RunContext, is_live
from omgoptim.operations.report_records import ratio_of
from omgoptim.operations.timing import AS_FAST_ONCE, OVERLOADED
from omgoptim.operations.verdict import size_phrase
from omgoptim.reports import EfficiencyReport, Gain, Gains, GainsBy, Measurement, Total
from omgoptim.reports.measured import AGREEMENT_METRICS
from omgoptim.requests import ModelRequest, Request

WAITING, WAITING_UNDER_LOAD = 0.5, 0.8
"""Share of its time above which a process is said to wait: the majority; larger on an overloaded machine, where the
share is less certain. The second is chosen."""

PLAUSIBLE_ENGINE = 30.0
"""Maximum plausible speedup by the engine alone; above it the original mostly ran something else than kernels. Chosen:
more than a compiler gains on kernels; nothing but a sentence depends on it."""

PLAUSIBLE_PRECISION = 16.0
"""Maximum plausible speedup by int8 on one engine: a fourth of the bytes times a fourth of the instructions."""


@dataclass(frozen=True, slots=True)
class TimedModel:
    """Timing and size of one compared model."""

    timing: Timing
    size_bytes: int | None


def gains_by(before: TimedModel, plain: TimedModel, after: TimedModel, load: float) -> GainsBy:
    """Split a gain into the engine's and the precision's on that engine.

    Args:
        before: the original on its own engine.
        plain: the float32 model on the engine of `after`; `before` itself where the original runs on that engine.
        after: the artifact.
        load: of other processes; no ratio of times from an overloaded machine.
    """
    known = load <= OVERLOADED
    launches = range(after.timing.launches)
    to_plain = plain.timing.log_ratios or tuple(0.0 for _ in launches)
    to_after = after.timing.log_ratios or tuple(0.0 for _ in launches)
    between = tuple(b - a for a, b in zip(to_plain, to_after, strict=False))
    return GainsBy(
        engine=_gain(to_plain if known else (), before, plain),
        precision=_gain(between if known else (), plain, after),
    )


def _gain(log_ratios: tuple[float, ...], one: TimedModel, other: TimedModel) -> Gain:
    size = ratio_of(one.size_bytes, other.size_bytes)
    if not log_ratios:
        return Gain(size_ratio=size)
    centre, half = t_interval(log_ratios)
    known = math.isfinite(half)
    return Gain(
        speedup=math.exp(centre),
        speedup_low=math.exp(centre - half) if known else None,
        speedup_high=math.exp(centre + half) if known else None,
        size_ratio=size,
    )


def gain_split_sentence(parts: GainsBy, engine: str, precision: str) -> str:
    """Return `Speedup by the engine alone (float32 on openvino): 3.10x; by int8 on it: 1.42x.`, or nothing."""
    if parts.engine.speedup is None or parts.precision.speedup is None or precision == "float32":
        return ""
    return (
        f"Speedup by the engine alone (float32 on {engine}): {parts.engine.speedup:.2f}x; "
        f"by {precision} on it: {parts.precision.speedup:.2f}x."
    )


def is_slower(parts: GainsBy | None, precision: str) -> bool:
    """Return whether lower precision is slower than float32 on the same engine."""
    if parts is None or parts.precision.speedup is None or precision == "float32":
        return False
    high = parts.precision.speedup_high
    return high < 1 if high is not None else parts.precision.speedup < 1 / AS_FAST_ONCE


def slower_sentence(parts: GainsBy | None, engine: str, precision: str) -> str:
    """Return a sentence where lower precision is slower than float32 on the same engine; else nothing."""
    if parts is None or parts.precision.speedup is None or not is_slower(parts, precision):
        return ""
    part = parts.precision
    interval = ""
    if part.speedup_low is not None and part.speedup_high is not None:
        interval = f" ({1 / part.speedup_high:.2f} to {1 / part.speedup_low:.2f})"
    return (
        f"{precision} is {1 / parts.precision.speedup:.2f}x slower{interval} than float32 on {engine}, the same engine."
    )


def waiting_share(timing: Timing, load: float, device: str) -> float | None:
    """Return the share of its time that a process neither computed nor waited for a core, if that is most of it.

    None on a GPU, whose computations look like waiting.
    """
    if device != "cpu":
        return None
    most = WAITING if load <= OVERLOADED else WAITING_UNDER_LOAD
    return timing.idle if timing.idle is not None and timing.idle > most else None


def waiting_sentence(share: float) -> str:
    """Return a sentence on a model that waits, and on the gain that is possible."""
    return (
        f"the model waits {share:.0%} of its time (sleep, I/O, locks) instead of computing: no technique shortens the "
        "wait, and a speedup because an export omits it is not due to compression"
    )


def waiting_warnings(before: Timing, after: Timing, load: float, device: str) -> list[str]:
    """Return the warning on an original that waits, with or without its artifact."""
    waits = waiting_share(before, load, device)
    if waits is None:
        return []
    return [wait_removed_sentence(before, after, load, device) or waiting_sentence(waits)]


def wait_removed_sentence(
    before: Timing, after: Timing | None, load: float, device: str, original: str = "the original"
) -> str:
    """Return a sentence where the original waits and the artifact does not; else nothing.

    An artifact that waits too leaves nothing out. `original` is the name of the original in the sentence.
    """
    waits = waiting_share(before, load, device)
    if waits is None or (after is not None and waiting_share(after, load, device) is not None):
        return ""
    doubt = "Implausible speedup" if load <= OVERLOADED else "Any speedup would be implausible"
    return (
        f"{doubt}: {original} waits {waits:.0%} of its time (sleep, I/O, locks) "
        "instead of computing, and the artifact does not wait"
    )


def implausible_sentence(
    parts: GainsBy | None, before: Timing, engine: str, device: str, load: float, after: Timing | None = None
) -> str:
    """Return a sentence on a speedup that computation cannot explain; nothing where it is plausible.

    `parts` is the gain by engine and precision; None where float32 was not measured on the artifact's `engine`.
    """
    waiting = wait_removed_sentence(before, after, load, device)
    if waiting or load > OVERLOADED or parts is None:
        return waiting
    alone, bits = parts.engine.speedup, parts.precision.speedup
    if alone is not None and alone > PLAUSIBLE_ENGINE:
        return (
            f"Implausible speedup: float32 on {engine} alone is {alone:.0f}x faster than the original: "
            f"{1 - 1 / alone:.1%} of the original's time is Python or waiting, not computation"
        )
    if bits is not None and bits > PLAUSIBLE_PRECISION:
        return (
            f"Implausible speedup: lower precision gives {bits:.0f}x over float32 on {engine}, more than "
            "fewer bytes and faster integer instructions can explain"
        )
    return ""


MEASURED_WITH = ("data", "inputs", "samples", "seed")
"""Arguments that must agree for two runs to have the same evaluation samples."""


def with_total_gain(report: EfficiencyReport, request: Request, context: RunContext) -> EfficiencyReport:
    """Add the total gain to the report of a run that changed an earlier run's artifact."""
    if not isinstance(request, ModelRequest) or report.after is None or is_live(request.model):
        return report
    first = _first_run(request, context)
    begun = _report_of(first, context.project) if first else None
    if begun is None or begun.before is None:
        return report
    total = _total(begun, begun.before, report, report.after)
    sentence = total_sentence(total)
    summary = f"{report.summary} {sentence}" if sentence else report.summary
    return report.model_copy(update={"total": total, "summary": summary})


def total_sentence(total: Total) -> str:
    """Return a sentence such as `Against the first original, of run prune-…: 7.90x smaller on disk; …`."""
    parts = [size_phrase(Gains(size_ratio=total.size_ratio))] if total.size_ratio is not None else []
    if total.quality_drop is not None:
        parts.append(f"a quality drop of {total.quality_drop:.4f}")
    if not parts:
        return ""
    return (
        f"Against the first original, of run {total.from_run}: {', '.join(parts)}; speed against it was not measured."
    )


def _first_run(request: ModelRequest, context: RunContext) -> str | None:
    """Return the oldest run in the lineage of the request's model; None where it is not an artifact."""
    try:
        folder = find_artifact(request.model, PathPolicy.of_request(context.project, request))
        lineage = Manifest.read(folder).lineage if folder is not None else ()
    except OmgoptimError:
        return None
    return lineage[0] if lineage else None


def _report_of(run_id: str, project: Path) -> EfficiencyReport | None:
    """Read the signed report of a run of this project and user; None where there is none.

    A manifest names only the run, and unsealed numbers may not be measured.
    """
    if Path(run_id).name != run_id:
        return None
    found = read_report(project / RUNS / run_id / "report.json", run_id)
    return found[0] if found and found[1] else None


def _total(begun: EfficiencyReport, first: Measurement, report: EfficiencyReport, last: Measurement) -> Total:
    compared = [(begun.request.get(name), report.request.get(name)) for name in MEASURED_WITH]
    same = all(one == other and not is_live(one) for one, other in compared)
    each_its_own = last.metric in AGREEMENT_METRICS  # with the original of its own run
    comparable = same and not each_its_own and (first.metric, first.samples) == (last.metric, last.samples)
    drop = None
    if comparable and first.quality is not None and last.quality is not None:
        drop = first.quality - last.quality
    return Total(
        from_run=begun.run_id,
        size_ratio=ratio_of(first.size_bytes, last.size_bytes),
        params_ratio=ratio_of(first.params, last.params),
        macs_ratio=ratio_of(first.macs, last.macs),
        quality_drop=drop,
    )
