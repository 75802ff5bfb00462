"""Proposal of the next configuration: Thompson sampling on an additive surrogate, near the latency limit.

A configuration's *load* is its predicted latency over the target (the largest such ratio, if there are more limits).
Only loads of 0.85 to 1 are proposed: smaller networks leave the budget unused. The first proposals are spread out,
each later one is the best under a set of weights drawn from the posterior, and every fifth is a mutation of the best
so far (White et al. 2020, arXiv:2005.02960; 2019, arXiv:1910.11858).

A proposal depends on the observations, the seed and the trial's number alone, so that a resumed search goes on as an
uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from omgoptim.architecture_search import surrogate
from omgoptim.architecture_search.space import Indices, Space

Load = Callable[[Indices], NDArray[np.float64]]
"""Function from rows of option indices to predicted cost over the limit; at most 1 is within it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings of a proposal."""

    first: int = 8
    """Number of space-filling proposals before the surrogate is used."""
    mutate_every: int = 5
    """Period of proposals that mutate the best configuration."""
    band: float = 0.85
    """Smallest load that is proposed."""
    wider: float = 0.7
    """Lower edge of the band where it holds too few configurations."""
    fewest: int = 50
    """Minimum configurations in the band; with fewer it is widened."""
    sampled: int = 2000
    """Configurations drawn from a space that is too large to enumerate."""
    hints: Load | None = None
    """Additional feature of the surrogate from prior knowledge, such as the logarithm of the multiply-accumulates, or
    the summed quality of the single replacements.
    """


DEFAULT = Rule()


@dataclass(frozen=True, slots=True)
class Observations:
    """Observations of a search so far."""

    rows: Indices
    """Configurations that were trained, shape [trials, knobs]."""
    qualities: NDArray[np.float64]
    """Their qualities, shape [trials]; higher is better."""
    excluded: Indices
    """Excluded configurations: measured as too slow, or failed; shape [any, knobs]."""

    @classmethod
    def none(cls, space: Space) -> Observations:
        """Return empty observations of a space."""
        empty = np.empty((0, len(space.knobs)), dtype=np.int64)
        return cls(empty, np.empty(0), empty)


class Proposer(Protocol):
    """Proposal rule: chooses the next configuration; also the type of the random control."""

    def __call__(
        self, space: Space, load: Load, seen: Observations, seed: int, number: int, rule: Rule = ...
    ) -> Indices | None:
        """Return the option indices to try next; see `propose`."""
        ...


def propose(
    space: Space, load: Load, seen: Observations, seed: int, number: int, rule: Rule = DEFAULT
) -> Indices | None:
    """Return the option indices to try next, shape [knobs]; None when everything within the limit was tried.

    Args:
        space: the product of knobs.
        load: predicted cost over the limit.
        seen: configurations and their results so far.
        seed: of the search.
        number: of this proposal in the search, rejected ones counted, from 0.
        rule: settings of the proposal.
    """
    generator = np.random.default_rng([seed, number])
    rows, loads = _candidates(space, load, seen, rule, generator)
    if not len(rows):
        return None
    trained = len(seen.rows)
    if trained < max(rule.first, 2) or float(np.ptp(seen.qualities)) == 0.0:
        return _farthest(rows, np.concatenate([seen.rows, seen.excluded]), generator)
    every = np.concatenate([_features(space, seen.rows, load(seen.rows), rule), _features(space, rows, loads, rule)])
    scaled = _standardized(every, trained)
    posterior = surrogate.fit(scaled[:trained], seen.qualities)
    drawn = posterior.sample(scaled[trained:], generator)
    if (trained + 1) % rule.mutate_every == 0:
        near = _near(space, rows, seen.rows[int(np.argmax(seen.qualities))])
        if near.any():
            drawn = np.where(near, drawn, -np.inf)
    return _row(rows, int(np.argmax(drawn)))


def propose_random(
    space: Space, load: Load, seen: Observations, seed: int, number: int, rule: Rule = DEFAULT
) -> Indices | None:
    """Return a configuration drawn uniformly from those predicted to be within the limit: the control."""
    generator = np.random.default_rng([seed, number])
    rows = _untried(space.sample(rule.sampled, generator), seen)
    rows = rows[load(rows) <= 1.0] if len(rows) else rows
    return _row(rows, int(generator.integers(len(rows)))) if len(rows) else None


def _candidates(
    space: Space, load: Load, seen: Observations, rule: Rule, generator: np.random.Generator
) -> tuple[Indices, NDArray[np.float64]]:
    """Return untried configurations in the band with their loads; the widest band that is needed for any."""
    rows = space.sample(rule.sampled, generator)
    if len(seen.rows):
        best = seen.rows[np.argsort(-seen.qualities, kind="stable")[:5]]
        rows = np.unique(np.concatenate([rows, *(space.mutants(row) for row in best)]), axis=0)
    loads = load(rows)
    low = rule.band if int(((loads >= rule.band) & (loads <= 1.0)).sum()) >= rule.fewest else rule.wider
    untried = _is_untried(rows, seen)
    for edge in (low, rule.wider, -np.inf):
        inside = untried & (loads >= edge) & (loads <= 1.0)
        if inside.any():
            return rows[inside], loads[inside]
    return rows[:0], loads[:0]


def _features(space: Space, rows: Indices, loads: NDArray[np.float64], rule: Rule) -> NDArray[np.float64]:
    """Return the features of rows: option indicators, the logarithm of the load, and the hint."""
    columns = [space.one_hot(rows), np.log(np.maximum(loads, 1e-6))[:, None]]
    if rule.hints is not None:
        columns.append(rule.hints(rows)[:, None])
    return np.concatenate(columns, axis=1)


def _standardized(features: NDArray[np.float64], observed: int) -> NDArray[np.float64]:
    """Centre on the observed rows and give each feature unit variance over all."""
    spread = features.std(axis=0)
    scaled: NDArray[np.float64] = (features - features[:observed].mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    return scaled


def _farthest(rows: Indices, tried: Indices, generator: np.random.Generator) -> Indices:
    """Return the candidate with the largest Hamming distance to its nearest tried configuration; random among ties."""
    if not len(tried):
        return _row(rows, int(generator.integers(len(rows))))
    nearest = np.full(len(rows), np.inf)
    for row in tried:
        nearest = np.minimum(nearest, (rows != row).sum(axis=1))
    return _row(rows, int(generator.choice(np.flatnonzero(nearest == nearest.max()))))


def _row(rows: Indices, index: int) -> Indices:
    row: Indices = rows[index]
    return row


def _near(space: Space, rows: Indices, best: Indices) -> NDArray[np.bool_]:
    mutants = {row.tobytes() for row in space.mutants(best)}
    return np.array([row.tobytes() in mutants for row in rows], dtype=np.bool_)


def _is_untried(rows: Indices, seen: Observations) -> NDArray[np.bool_]:
    tried = {row.tobytes() for row in np.concatenate([seen.rows, seen.excluded])}
    return np.array([row.tobytes() not in tried for row in rows], dtype=np.bool_)


def _untried(rows: Indices, seen: Observations) -> Indices:
    return rows[_is_untried(rows, seen)]
