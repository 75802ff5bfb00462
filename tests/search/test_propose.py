"""A proposal lies within the limit, is new, depends on seed and number alone, and follows what was observed."""

from __future__ import annotations

import numpy as np
import pytest

from omgoptim.architecture_search.propose import Observations, Proposer, Rule, propose, propose_random
from omgoptim.architecture_search.space import Indices, Knob, Space

SPACE = Space(tuple(Knob(f"stage{number}", (0, 1, 2)) for number in range(6)))
WAYS = [propose, propose_random]


def load(rows: Indices) -> np.ndarray:
    """Two of each stage cost 12, and 8 is the limit."""
    return rows.sum(axis=1) / 8.0


def search(way: Proposer, trials: int, seed: int = 0, load=load, quality=None) -> Observations:
    quality = quality or (lambda row: float(row[0] - row[5]))
    seen = Observations.none(SPACE)
    for number in range(trials):
        row = way(SPACE, load, seen, seed, number)
        assert row is not None
        seen = Observations(np.vstack([seen.rows, row]), np.append(seen.qualities, quality(row)), seen.excluded)
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_proposals_are_within_the_limit_and_never_twice_the_same(way: Proposer) -> None:
    seen = search(way, 30)
    assert (load(seen.rows) <= 1.0).all()
    assert len(np.unique(seen.rows, axis=0)) == 30


def test_the_rule_proposes_only_near_the_limit() -> None:
    assert (load(search(propose, 30).rows) >= Rule().band).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_proposal_depends_on_the_observations_the_seed_and_its_number_alone(way: Proposer) -> None:
    whole = search(way, 14)
    for cut in (0, 3, 9, 13):
        seen = Observations(whole.rows[:cut], whole.qualities[:cut], whole.excluded)
        assert (way(SPACE, load, seen, 0, cut) == whole.rows[cut]).all()
    assert not (search(way, 14, seed=1).rows == whole.rows).all()


@pytest.mark.parametrize("way", WAYS)
def test_what_was_measured_as_too_slow_is_not_proposed_again(way: Proposer) -> None:
    inside = SPACE.every[load(SPACE.every) <= 1.0]
    seen = Observations(inside[:0], np.empty(0), inside[1:])
    assert (way(SPACE, load, seen, 0, 0) == inside[0]).all()
    assert way(SPACE, load, Observations(inside[:0], np.empty(0), inside), 0, 0) is None


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_proposed_when_everything_is_over_the_limit(way: Proposer) -> None:
    assert way(SPACE, lambda rows: np.full(len(rows), 1.5), Observations.none(SPACE), 0, 0) is None


def test_the_band_widens_where_it_is_empty() -> None:
    row = propose(SPACE, lambda rows: np.full(len(rows), 0.2), Observations.none(SPACE), 0, 0)
    assert row is not None


def test_the_first_proposals_are_farther_apart_than_random_ones() -> None:
    def nearest(rows: Indices) -> float:
        apart = (rows[:, None] != rows[None]).sum(axis=2) + 99 * np.eye(len(rows))
        return float(apart.min())

    spread = [nearest(search(propose, 6, seed).rows) for seed in range(10)]
    by_lot = [nearest(search(propose_random, 6, seed).rows) for seed in range(10)]
    assert np.mean(spread) > np.mean(by_lot) + 1


def test_every_fifth_proposal_is_a_mutation_of_the_best() -> None:
    seen = search(propose, 25, quality=lambda row: float((row * [4, 1, 2, 1, 1, 3]).sum()))
    for trial in (9, 14, 19, 24):
        best = seen.rows[:trial][np.argmax(seen.qualities[:trial])]
        assert (SPACE.mutants(best) == seen.rows[trial]).all(axis=1).any()


def test_later_proposals_find_what_pays() -> None:
    seen = search(propose, 25)
    assert seen.qualities[15:].mean() > seen.qualities[:8].mean() + 0.8
    assert seen.qualities.max() == 2.0


def test_a_hint_that_is_true_is_followed_after_the_first_proposals() -> None:
    weights = np.random.default_rng(0).standard_normal(len(SPACE.every))
    where = {row.tobytes(): weights[index] for index, row in enumerate(SPACE.every)}

    def known(rows: Indices) -> np.ndarray:
        return np.array([where[row.tobytes()] for row in rows])

    def mean_quality(rule: Rule) -> float:
        seen = Observations.none(SPACE)
        for number in range(16):
            row = propose(SPACE, load, seen, 0, number, rule)
            assert row is not None
            value = where[row.tobytes()]
            seen = Observations(np.vstack([seen.rows, row]), np.append(seen.qualities, value), seen.excluded)
        return float(seen.qualities[8:].mean())

    assert mean_quality(Rule(hints=known)) > mean_quality(Rule()) + 0.5
