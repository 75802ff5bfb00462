"""Pruning for a measured speed: cut, measure the whole model in fresh processes, aim again, until the goal holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from omgoptim.errors import OmgoptimError
from omgoptim.measure.timing import Timing, TimingPlan, time_artifacts
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.compression_job import Job
from omgoptim.operations.save_and_measure import Measured, save
from omgoptim.requests import Params, PruneRequest
from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._channels.channel_allocation import best as best_channels
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.importance import importance_of
from omgoptim.techniques.prune._channels.removal import remove
from omgoptim.techniques.prune._latency.knapsack import choose_widths, fastest_widths
from omgoptim.techniques.prune._latency.latency_table import Aim, TimeTable, floor_ms, full_ms, next_aim, predicted_ms
from omgoptim.techniques.prune._latency.layer_benchmark import round_to_of
from omgoptim.techniques.prune._latency.layer_timing import measure_layer_times
from omgoptim.techniques.prune.structured import keep_only, nothing_to_remove
from omgoptim.techniques.registry import Outcome
from omgoptim.training.modes import placed

SEARCHING = TimingPlan(launches=3, most_launches=3, rounds=3, throughput_launches=0)
"""Timing of a cut during the search: enough to aim by. What is reported is measured in full afterwards."""

MOST_CUTS = 6
"""Cuts that are measured before the best of them is taken."""

CLOSE = 1.06
"""A cut that is faster than the goal by less than this factor ends the search: a gentler one would hardly keep more."""

MARGIN = 0.015
"""How much faster than the goal is aimed at: the full measurement scatters around that of the search."""

JUST_ABOVE = 1.001
"""What is asked of the knapsack lies at least this factor above the least that it can reach."""

WITHIN_NOISE = 0.97
"""A measured speed this close to the goal counts as reached where the goal lies in its interval."""


@dataclass(frozen=True, slots=True)
class SpeedGoal:
    """A speed to reach by the end of a round."""

    speedup: float | None
    """Latency of the original over the result's, on the same engine."""
    latency_ms: float | None
    """Or milliseconds of one call at batch 1."""
    share: float
    """How much of the way this round goes, 0..1, on the scale of log time."""

    @property
    def amount(self) -> float | None:
        """Fraction of the time that is to go by the end of the round; not known of a latency before it is measured."""
        return None if self.speedup is None else 1 - self.speedup**-self.share

    def fraction(self, original_ms: float) -> float:
        """Fraction of the original's time to come down to."""
        wanted = 1 / self.speedup if self.speedup is not None else (self.latency_ms or original_ms) / original_ms
        return float(wanted**self.share)


@dataclass(frozen=True, slots=True)
class Cut:
    """Widths that were tried."""

    widths: dict[str, int]
    fraction: float
    """Measured time of the whole model as a fraction of the original's."""


def take_for_speed(
    job: Job[PruneRequest], goal: SpeedGoal, params: Params, module: nn.Module, span: tuple[float, float]
) -> Outcome:
    """Remove channels from `module` until the whole model, measured in fresh processes, is as fast as the goal.

    Returns:
        What was removed. Where the goal lies beyond reach, the fastest cut, with a note of what was reached and why.

    Raises:
        OmgoptimError: no group can be pruned or timed, or no cut could be measured.
    """
    assert isinstance(params, Structured)  # what has such a goal
    run = job.module_run(span)
    start, end = span
    baseline = baseline_on(job.request.runtime, job.loaded, job.context)
    job.context.progress("finding what can be removed", start)
    groups = find_groups(module, params, run)
    if not groups.groups:
        raise nothing_to_remove(groups)
    importance = importance_of(module, groups, params, run)
    job.context.progress("measuring how each group's time depends on its width", start + 0.1 * (end - start))
    round_to = params.round_to or round_to_of(module, run)
    table = measure_layer_times(module, groups.groups, run, round_to=round_to)
    original_ms, begun = _measure(job, module, baseline)
    target = goal.fraction(original_ms) / begun * (1 - MARGIN)
    if target >= 1:
        return Outcome(
            [], groups.skipped, [f"the model already takes {begun * original_ms:.3g} ms: nothing was removed"]
        )

    def measured_at(number: int, widths: dict[str, int]) -> float:
        part = start + (end - start) * (0.2 + 0.8 * number / MOST_CUTS)
        job.context.progress(f"cutting for {1 / (target * begun):.3g}x the speed, cut {number + 1}", part)
        trial = copy.deepcopy(module)
        remove(trial, groups, best_channels(groups, importance, widths), run)
        return _measure(job, trial, baseline)[1] / begun

    best = _best(_cuts(table, importance, params.max_layer_ratio, target, measured_at), target)
    outcome = keep_only(module, groups, best_channels(groups, importance, best.widths), params, run)
    outcome.skipped.extend(skip for skip in groups.skipped if skip not in outcome.skipped)
    if best.fraction > target / (1 - MARGIN):
        outcome.notes.append(_beyond(best, begun, target, table, params, original_ms))
    return outcome


def _cuts(
    table: TimeTable,
    importance: Mapping[str, Tensor],
    max_layer_ratio: float,
    target: float,
    measured_at: Callable[[int, dict[str, int]], float],
) -> list[Cut]:
    """Cuts that come closer and closer to the target, until one is just within it or nothing new is left to try.

    Args:
        target: fraction of the whole model's time to come down to.
        measured_at: `measured_at(number, widths)`: the whole model's time at these widths, as a fraction.
    """
    narrowest = fastest_widths(table, importance, max_layer_ratio)
    least = predicted_ms(table, narrowest) / full_ms(table)
    cuts: list[Cut] = []
    history: list[Aim] = []
    while len(cuts) < MOST_CUTS and not _found(cuts, target):
        wanted = next_aim(history, target)
        beyond = wanted <= least * JUST_ABOVE  # less than the layers can take: the narrowest is all that there is
        widths = narrowest if beyond else choose_widths(table, importance, wanted, max_layer_ratio)
        if any(cut.widths == widths for cut in cuts):
            break
        fraction = measured_at(len(cuts), widths)
        cuts.append(Cut(widths, fraction))
        history.append(Aim(wanted, predicted_ms(table, widths) / full_ms(table), fraction))
        if widths == narrowest and fraction > target:
            break
    return cuts


def _measure(job: Job[PruneRequest], module: nn.Module, baseline: Path) -> tuple[float, float]:
    """The original's milliseconds, and the module's time as a fraction of it; both from the same launches."""
    cuts = job.context.work / "cuts"
    cuts.mkdir(parents=True, exist_ok=True)
    folder = cuts / str(len(list(cuts.iterdir())))
    save(placed(module, "cpu"), job.loaded, job.runtime, folder, job.context, to_time_only=True)
    with job.context.measuring():
        first, timing = time_artifacts([baseline, folder], job.loaded.bench, SEARCHING, job.request.seed)
    if isinstance(first, OmgoptimError):
        raise first
    if isinstance(timing, OmgoptimError):
        raise timing
    return first.latency_ms_p50, 1 / _speedup(timing)


def _speedup(timing: Timing) -> float:
    if timing.speedup is None:
        raise ValueError("only a challenger has a speedup")
    return timing.speedup.value


def _found(cuts: Sequence[Cut], target: float) -> bool:
    return any(cut.fraction <= target <= cut.fraction * CLOSE for cut in cuts)


def _best(cuts: Sequence[Cut], target: float) -> Cut:
    """The gentlest cut that holds the goal; if none does, the fastest."""
    holding = [cut for cut in cuts if cut.fraction <= target / (1 - MARGIN)]
    return max(holding, key=lambda cut: cut.fraction) if holding else min(cuts, key=lambda cut: cut.fraction)


def _beyond(best: Cut, begun: float, target: float, table: TimeTable, params: Structured, original_ms: float) -> str:
    """What was reached, and what stands in the way of more."""
    reached, asked = 1 / (best.fraction * begun), (1 - MARGIN) / (target * begun)
    floor = floor_ms(table, params.max_layer_ratio) / full_ms(table)
    left = best.fraction - predicted_ms(table, best.widths) / full_ms(table)
    why = (
        f"with every group at its narrowest (max_layer_ratio {params.max_layer_ratio:g}) its layers still take "
        f"{floor:.0%} of their time"
    )
    if left > 0.05:
        why += f", and about {left * begun * original_ms:.2g} ms of a call are spent outside of them"
    return f"{asked:.3g}x the speed is beyond reach: {reached:.3g}x was the best of the cuts that were measured; {why}"


def reached(method: Structured, measured: Measured) -> str | None:
    """Why a speed goal was not reached, by the full measurement; None if it was, or if there was none."""
    speedup, high = measured.gains.speedup, measured.gains.speedup_high
    if method.target_latency_ms is not None:
        took, asked = measured.after.latency_ms_p50 or 0.0, method.target_latency_ms
        return None if took * WITHIN_NOISE <= asked else f"one call takes {took:.3g} ms, and {asked:g} ms was asked for"
    if method.target_speedup is None:
        return None
    if speedup is None:
        return "the machine was too busy for its speed to be told"
    asked = method.target_speedup
    if speedup >= asked or (speedup >= WITHIN_NOISE * asked and (high is None or high >= asked)):
        return None
    return f"it is measured to be {speedup:.2f}x as fast, and {asked:g}x was asked for"
