"""Predictions for a configuration before it is trained: its cost, and prior scores of its quality.

Costs are fitted to whole untrained networks that were measured in the final engine. The prior score of an option is the
quality of the model with one stage replaced and not trained: weights of a replacement are fitted to the stage's outputs
(`omgoptim/techniques/distill`). The sum over a configuration's options is a feature of the surrogate. Source of the
scores: the block-wise scores of LANA (Molchanov et al. 2021, arXiv:2107.10624); differs in a closed-form fit, without
training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omgoptim.architecture_search.latency import Predictor, best_fit
from omgoptim.architecture_search.propose import Load
from omgoptim.architecture_search.space import Configuration, Indices, Option, Space
from omgoptim.architecture_search.study import truncate_torn_line
from omgoptim.architecture_search.trials import TrialResult
from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.operations.architecture_search.costs import CostMeter
from omgoptim.operations.architecture_search.spaces import SearchSpace
from omgoptim.operations.compression_job import Job
from omgoptim.requests import SearchRequest

MIN_NETWORKS, MAX_NETWORKS = 8, 30
"""Networks that are measured before the first trial, without those below."""

MIXED_NETWORKS = 8
"""Networks of several changed options that are measured beside every single one, for the correction of their sum."""

SAVED_TOGETHER = 5
"""Networks that are saved before they are timed; on a target they are timed in one launch. Chosen: memory."""


@dataclass(slots=True)
class Predictions:
    """Measured networks, and predictions for the others."""

    space: Space
    costs: CostMeter
    configurations: list[dict[str, Option]] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    latest: Predictor | None = None

    def latency(self, configuration: Configuration) -> float:
        """Return the predicted latency in ms, by what was measured so far."""
        fit = self.latest or self._fit(self.latencies, self._rows(self.configurations))
        return float(fit.predict(self.space.row(configuration)[None])[0])

    @property
    def error(self) -> float | None:
        """Median relative error of latency when each measured network is left out in turn."""
        return self._fit(self.latencies, self._rows(self.configurations)).error

    def loads(self, trials: dict[int, TrialResult], configurations: dict[int, Configuration]) -> Load:
        """Return the predicted load by all that was measured, trials included."""
        timed = {number: trial.measured_ms for number, trial in trials.items() if trial.measured_ms}
        sized = {number: trial.size_bytes for number, trial in trials.items() if trial.size_bytes}
        measured = [
            self._rows([*self.configurations, *(configurations[number] for number in known)])
            for known in (timed, sized)
        ]
        self.latest = self._fit([*self.latencies, *timed.values()], measured[0])
        sizes = self._fit([*self.sizes, *sized.values()], measured[1])
        latency, limits = self.latest, self.costs.limits

        def load(rows: Indices) -> NDArray[np.float64]:
            found = np.zeros(len(rows))
            for fit, limit in ((latency, limits.latency_ms), (sizes, limits.size_bytes)):
                if limit is not None:
                    found = np.maximum(found, fit.predict(rows) / limit)
            # Where memory alone is limited, nothing is predicted: the measurement decides.
            return found if limits.latency_ms or limits.size_bytes else np.ones(len(rows))

        return load

    @property
    def measured_loads(self) -> list[float]:
        """Largest load of each network that was measured: its cost over the limit."""
        return [
            max(self.costs.limits.loads(latency, size, None).values(), default=0.0)
            for latency, size in zip(self.latencies, self.sizes, strict=True)
        ]

    def _fit(self, values: Sequence[float], rows: Indices) -> Predictor:
        return best_fit(self.space, rows, values)

    def _rows(self, configurations: Sequence[Configuration]) -> Indices:
        return np.array([self.space.row(each) for each in configurations])


def measure_first_networks(
    space: Space, search_space: SearchSpace, costs: CostMeter, folder: Path, trials: int
) -> Predictions:
    """Measure the first whole networks, untrained; those that an interrupted search measured are read.

    Raises:
        TechniqueError: none could be built and measured, with the commonest reason.
    """
    found = Predictions(space, costs)
    file = folder / "measured.jsonl"
    truncate_torn_line(file)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        entry = _parsed_line(line)
        if entry is not None:
            _add(found, *entry)
    reasons: list[str] = []
    rows = [space.configuration(row) for row in first_configurations(space, costs.job.request.seed, trials)]
    left = [each for each in rows if each not in found.configurations]
    for start in range(0, len(left), SAVED_TOGETHER):
        done = 0.15 + 0.1 * start / len(left)
        costs.job.context.progress(f"measuring untrained networks: {start} of {len(left)}", done)
        reasons += _measure(left[start : start + SAVED_TOGETHER], search_space, found, file)
    if not found.configurations:
        raise TechniqueError("no network of the space could be measured", max(reasons, key=reasons.count))
    return found


def first_configurations(space: Space, seed: int, trials: int) -> Indices:
    """Return the configurations to measure first: each option once where there are few, and others at random."""
    count = min(max(MIN_NETWORKS, trials), MAX_NETWORKS, space.size)
    single_changes = space.single_changes if 2 * len(space.single_changes) <= 3 * count else space.single_changes[:1]
    count = max(count, min(len(single_changes) + MIXED_NETWORKS, space.size))
    generator = np.random.default_rng([seed, 7])
    drawn = np.stack([generator.integers(options, size=4 * count) for options in space.counts], axis=1)
    _, places = np.unique(np.concatenate([single_changes, drawn]), axis=0, return_index=True)
    rows = np.concatenate([single_changes, drawn])[np.sort(places)]
    chosen: Indices = rows[:count].astype(np.int64)
    return chosen


def _measure(
    configurations: Sequence[dict[str, Option]], search_space: SearchSpace, found: Predictions, file: Path
) -> list[str]:
    """Measure networks in one launch; return the reasons of those that failed."""
    costs = found.costs
    reasons: list[str] = []
    saved: list[tuple[dict[str, Option], Path]] = []
    scratch = costs.job.context.work / "first"
    shutil.rmtree(scratch, ignore_errors=True)
    for number, configuration in enumerate(configurations):
        try:
            is_first = not found.configurations and not saved  # what cannot be delivered fails before any training
            costs.save(search_space.build_to_time(configuration), scratch / str(number), to_time_only=not is_first)
            saved.append((configuration, scratch / str(number)))
        except OmgoptimError as error:
            reasons.append(error.reason)
    if not saved:
        return reasons
    with open(file, "a", encoding="utf-8") as target:
        for (configuration, _), cost in zip(saved, costs.time_artifacts([folder for _, folder in saved]), strict=True):
            if isinstance(cost, OmgoptimError):
                reasons.append(cost.reason)
                continue
            latency, size = cost.latency_ms or 0.0, cost.size_bytes or 0
            _add(found, configuration, latency, size)
            line = {"configuration": configuration, "latency_ms": latency, "size_bytes": size}
            target.write(json.dumps(line) + "\n")
    shutil.rmtree(scratch, ignore_errors=True)
    return reasons


def _add(found: Predictions, configuration: dict[str, Option], latency: float, size: int) -> None:
    found.configurations.append(configuration)
    found.latencies.append(latency)
    found.sizes.append(size)


def _parsed_line(line: str) -> tuple[dict[str, Option], float, int] | None:
    """Return a line of the file; None for one that a kill tore."""
    try:
        entry = json.loads(line)
        return dict(entry["configuration"]), float(entry["latency_ms"]), int(entry["size_bytes"])
    except (ValueError, KeyError, TypeError):
        return None


MIN_MINUTES = 60.0
"""Budget from which the scores are worth their time. Chosen: every option is scored once, which a short budget needs
for trials."""

MAX_LOSS = 1.0
"""Loss of an option that cannot be scored, or gives no usable numbers. The largest quality drop there is for a metric
in 0..1."""


def prior_scores(job: Job[SearchRequest], search_space: SearchSpace, folder: Path) -> Load | None:
    """Score each option alone on the selection samples; None for a user's space, or where the budget is short.

    Scores of an interrupted search are read.
    """
    minutes, space = job.request.budget_minutes, search_space.product
    if space is None or search_space.parameters is not None or minutes is None or minutes < MIN_MINUTES:
        return None
    file = folder / "prior.jsonl"
    truncate_torn_line(file)
    losses = [float(line) for line in file.read_text().splitlines()] if file.exists() else []
    single_changes = space.single_changes[1:]
    for number, row in enumerate(single_changes[len(losses) :], start=len(losses)):
        job.context.progress(f"scoring replacements untrained: {number} of {len(single_changes)}", 0.24)
        try:
            score = job.datasets.evaluator.score(search_space.build(space.configuration(row)))
            loss = min(MAX_LOSS, job.drop(score))
        except OmgoptimError:  # options that do not build are found by the search
            loss = MAX_LOSS
        losses.append(loss)
        with open(file, "a", encoding="utf-8") as target:
            target.write(json.dumps(loss) + "\n")
    return prior_score_of(space, losses)


def prior_score_of(space: Space, losses: list[float]) -> Load:
    """Return the function that sums the losses of a configuration's options, negated: higher is better.

    Args:
        space: of the configurations.
        losses: of each option but a knob's first, in the order of `Space.single_changes`.
    """

    def hint(rows: Indices) -> NDArray[np.float64]:
        total: NDArray[np.float64] = -(space.one_hot(rows) @ np.array(losses))
        return total

    return hint
