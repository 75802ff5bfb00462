"""Latency predictors: a sum over the choices of a configuration, with its error.

`fit_correction` takes a table of blocks, each measured as a replacement in the whole network (`replacements`), and
fits three parameters to other networks for what a sum of blocks lacks: the call itself, fusion across blocks, and the
cost of one more block. `fit_options` needs whole networks only and fits a term for each option, of the latency or of
its logarithm. `best_fit` returns the predictor with the smaller leave-one-out error.

Both weigh relative errors. Latencies are in ms; other additive costs (bytes of weights) can be predicted likewise.
Source: the sum over a table of layers is that of ProxylessNAS (Cai et al. 2018, arXiv:1812.00332), appendix B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from omgoptim.architecture_search.space import Indices, Space
from omgoptim.errors import DataError

Floats = NDArray[np.float64]

RIDGE = 1e-3
"""Weight of the prior in a fit of relative errors: latencies known to 3 %, terms free to change them by 100 %."""

MIN_HELD_OUT = 5
"""Minimum networks for the error of a predictor; with fewer, all networks are used. Chosen: the mean error of fewer is
mostly chance."""


class Predictor(Protocol):
    """Predictor of latencies of rows of option indices, and its error."""

    @property
    def error(self) -> float | None:
        """Median relative error when each measured network is left out in turn; None below three networks."""

    def predict(self, rows: Indices) -> Floats:
        """Return latencies in ms, shape [configurations]."""


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Latencies of blocks, each measured alone, without the part that all networks share."""

    base: float
    """Latency of the part that all networks share, in ms."""
    blocks: tuple[tuple[float, ...], ...]
    """For each knob, the latency of each option in ms; 0 where the option leaves nothing behind."""

    def sums(self, rows: Indices) -> Floats:
        """Return the summed latencies of the blocks, shape [configurations]."""
        total: Floats = self._chosen(rows).sum(axis=1)
        return total

    def counts(self, rows: Indices) -> Floats:
        """Return how many blocks a configuration has left, shape [configurations]."""
        left: Floats = (self._chosen(rows) > 0).sum(axis=1, dtype=np.float64)
        return left

    def _chosen(self, rows: Indices) -> Floats:
        return np.stack([np.asarray(times)[rows[:, knob]] for knob, times in enumerate(self.blocks)], axis=1)


@dataclass(frozen=True, slots=True)
class CorrectedTable:
    """Corrected table: `constant + scale * sum of blocks + each * number of blocks`."""

    table: BlockTable
    constant: float
    scale: float
    per_block: float
    error: float | None

    def predict(self, rows: Indices) -> Floats:
        """Return predicted latencies in ms, shape [configurations]."""
        return self.constant + self.scale * self.table.sums(rows) + self.per_block * self.table.counts(rows)


@dataclass(frozen=True, slots=True)
class FittedOptions:
    """Fitted terms: a constant and a term for every option but a knob's first, of the latency or its logarithm."""

    space: Space
    weights: Floats
    logarithmic: bool
    error: float | None

    def predict(self, rows: Indices) -> Floats:
        """Return predicted latencies in ms, shape [configurations]."""
        predicted = _with_constant(self.space.one_hot(rows)) @ self.weights
        return np.exp(predicted) if self.logarithmic else np.maximum(predicted, 0.0)


def replacements(space: Space, rows: Indices, measured: Sequence[float]) -> BlockTable | None:
    """Return the table of what each option costs in place of its knob's first; None unless each was measured alone.

    A knob's cheapest option is the 0 of its blocks: what every network of the space has stays in the base.
    """
    known = {row.tobytes(): value for row, value in zip(rows, measured, strict=True)}
    first, *others = (row.tobytes() for row in space.single_changes)
    if first not in known or not all(row in known for row in others):
        return None
    left = iter(others)
    blocks, base = [], known[first]
    for count in space.counts:
        costs = [0.0, *(known[next(left)] - known[first] for _ in range(count - 1))]
        cheapest = min(costs)
        blocks.append(tuple(cost - cheapest for cost in costs))
        base += cheapest
    return BlockTable(base, tuple(blocks))


def best_fit(space: Space, rows: Indices, measured: Sequence[float]) -> Predictor:
    """Return the predictor of least error: `fit_correction` where every option was measured alone, or `fit_options`.

    Both are evaluated on the networks that differ from the first options in more than one knob.

    Raises:
        DataError: there is no network, or a latency is not a positive number.
    """
    single_changes = {row.tobytes() for row in space.single_changes}
    others = [place for place, row in enumerate(rows) if row.tobytes() not in single_changes]
    held_out = others if len(others) >= MIN_HELD_OUT else None
    found: list[Predictor] = [fit_options(space, rows, measured, held_out)]
    table = replacements(space, rows, measured)
    if table is not None and held_out:
        found.append(fit_correction(table, rows[others], [measured[place] for place in others]))
    return min(found, key=lambda each: np.inf if each.error is None else each.error)


def fit_correction(table: BlockTable, rows: Indices, measured: Sequence[float]) -> CorrectedTable:
    """Fit the correction of a table to whole networks; without any, the table is returned unchanged.

    Args:
        table: latencies of the single blocks.
        rows: configurations that were measured as whole networks, shape [networks, knobs].
        measured: their latencies in ms, above 0.

    Raises:
        DataError: a measured latency is not a positive number.
    """
    latencies = _checked(measured)
    features = np.stack([np.ones(len(rows)), table.sums(rows), table.counts(rows)], axis=1)
    prior = np.array([table.base, 1.0, 0.0])

    def fit(kept: Indices) -> Floats:
        return _ridge(features[kept], latencies[kept], prior)

    weights = fit(np.arange(len(rows)))
    error = _held_out_error(fit, lambda index, solved: float(features[index] @ solved), latencies, np.arange(len(rows)))
    return CorrectedTable(table, float(weights[0]), float(weights[1]), float(weights[2]), error)


def fit_options(
    space: Space, rows: Indices, measured: Sequence[float], held_out_rows: Sequence[int] | None = None
) -> FittedOptions:
    """Fit a term for every option to whole networks.

    With `space.single_changes` among the networks, every option was seen at least once.

    Args:
        space: the knobs whose options get a term each.
        rows: configurations that were measured, shape [networks, knobs]; at least one.
        measured: their latencies in ms, above 0.
        held_out_rows: networks to leave out for the error, such as those of several changed options; default: all.

    Raises:
        DataError: there is no network, or a latency is not a positive number.
    """
    latencies = _checked(measured)
    if not len(latencies):
        raise DataError("no latency was measured", "a predictor needs at least one network")
    features = _with_constant(space.one_hot(rows))
    held_out = np.arange(len(latencies)) if held_out_rows is None else np.asarray(held_out_rows, dtype=np.int64)
    tried = [_fit_options(space, features, latencies, logarithmic, held_out) for logarithmic in (False, True)]
    return min(tried, key=lambda each: np.inf if each.error is None else each.error)


def _fit_options(
    space: Space, features: Floats, latencies: Floats, logarithmic: bool, held_out: Indices
) -> FittedOptions:
    def fit(kept: Indices) -> Floats:
        prior = np.zeros(features.shape[1])
        if logarithmic:
            logs = np.log(latencies[kept])
            prior[0] = logs.mean()
            gram = features[kept].T @ features[kept] + RIDGE * np.eye(len(prior))
            return prior + np.linalg.solve(gram, features[kept].T @ (logs - prior[0]))
        prior[0] = latencies[kept].mean()
        return _ridge(features[kept], latencies[kept], prior)

    def predict(index: int, weights: Floats) -> float:
        predicted = float(features[index] @ weights)
        return float(np.exp(predicted)) if logarithmic else predicted

    error = _held_out_error(fit, predict, latencies, held_out)
    return FittedOptions(space, fit(np.arange(len(latencies))), logarithmic, error)


def _ridge(features: Floats, latencies: Floats, prior: Floats) -> Floats:
    """Solve least squares of relative errors with a Gaussian prior; each weight in units of its prior deviation."""
    if not len(latencies):
        return prior
    x, y = features / latencies[:, None], np.ones(len(latencies))
    units = np.maximum(np.abs(x).max(axis=0), 1e-12)
    scaled = x / units
    gram = scaled.T @ scaled + RIDGE * np.eye(len(prior))
    weights: Floats = prior + np.linalg.solve(gram, scaled.T @ (y - x @ prior)) / units
    return weights


def _held_out_error(
    fit: Callable[[Indices], Floats], predict: Callable[[int, Floats], float], latencies: Floats, held_out: Indices
) -> float | None:
    """Return the median relative error of networks that the fit did not see."""
    if len(held_out) < 3:
        return None
    every = np.arange(len(latencies))
    predicted = np.array([predict(int(index), fit(np.delete(every, index))) for index in held_out])
    return float(np.median(np.abs(predicted - latencies[held_out]) / latencies[held_out]))


def _checked(measured: Sequence[float]) -> Floats:
    latencies = np.asarray(measured, dtype=np.float64)
    if not (np.isfinite(latencies) & (latencies > 0)).all():
        raise DataError("a measured latency is not a positive number", repr(list(measured))[:200])
    return latencies


def _with_constant(features: Floats) -> Floats:
    return np.concatenate([np.ones((len(features), 1)), features], axis=1)
