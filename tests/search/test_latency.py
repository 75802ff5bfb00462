"""The latency predictors recover sums that they were built for, and say how far they are off."""

from __future__ import annotations

import numpy as np
import pytest

from omgoptim.architecture_search.latency import BlockTable, best_fit, fit_correction, fit_options, replacements
from omgoptim.architecture_search.space import Knob, Space
from omgoptim.errors import DataError

SPACE = Space(tuple(Knob(f"stage{number}", ("keep", "half", "drop")) for number in range(4)))
TABLE = BlockTable(0.1, ((2.0, 1.0, 0.0), (4.0, 1.5, 0.0), (1.0, 0.5, 0.0), (3.0, 1.0, 0.0)))


def some(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(SPACE.all_rows)[:count]


def test_without_a_whole_network_the_table_stands_as_it_is() -> None:
    rows = np.array([[0, 0, 0, 0], [1, 2, 1, 2], [2, 2, 2, 2]])
    np.testing.assert_allclose(fit_correction(TABLE, rows[:0], []).predict(rows), [10.1, 1.6, 0.1])


def test_the_correction_recovers_fusion_and_the_cost_of_a_block() -> None:
    rows = some(16)
    measured = 0.3 + 0.8 * TABLE.sums(rows) + 0.05 * TABLE.counts(rows)
    predictor = fit_correction(TABLE, rows, measured.tolist())
    truth = 0.3 + 0.8 * TABLE.sums(SPACE.all_rows) + 0.05 * TABLE.counts(SPACE.all_rows)
    relative = np.abs(predictor.predict(SPACE.all_rows) / truth - 1)
    assert np.median(relative) < 0.02
    assert predictor.error is not None
    assert predictor.error < 0.02


def test_terms_of_options_recover_a_sum_and_a_product_from_whole_networks() -> None:
    rows = some(40)
    sums = 1.0 + TABLE.sums(SPACE.all_rows)
    products = np.exp(0.2 * TABLE.sums(SPACE.all_rows))
    for truth, logarithmic in ((sums, False), (products, True)):
        seen = [truth[np.flatnonzero((SPACE.all_rows == row).all(axis=1))[0]] for row in rows]
        predictor = fit_options(SPACE, rows, seen)
        assert predictor.logarithmic is logarithmic
        assert np.median(np.abs(predictor.predict(SPACE.all_rows) / truth - 1)) < 0.02


def test_singles_are_enough_for_a_sum_and_whole_networks_judge_it() -> None:
    rows = np.concatenate([SPACE.single_changes, some(6)])
    predictor = fit_options(SPACE, rows, (1.0 + TABLE.sums(rows)).tolist(), held_out_rows=range(9, 15))
    np.testing.assert_allclose(predictor.predict(SPACE.all_rows), 1.0 + TABLE.sums(SPACE.all_rows), rtol=0.05)
    assert predictor.error is not None
    assert predictor.error < 0.05


def test_the_error_is_that_of_networks_that_were_left_out() -> None:
    rows = some(30)
    noise = np.random.default_rng(1).lognormal(sigma=0.5, size=len(rows))
    predictor = fit_correction(TABLE, rows, (TABLE.sums(rows) + 1.0) * noise)
    assert predictor.error is not None
    assert 0.15 < predictor.error < 0.8


def test_two_networks_give_no_error_and_none_give_no_fit() -> None:
    rows = some(2)
    assert fit_options(SPACE, rows, [1.0, 2.0]).error is None
    with pytest.raises(DataError, match="no latency"):
        fit_options(SPACE, rows[:0], [])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_latency_that_is_no_positive_number_is_refused(bad: float) -> None:
    with pytest.raises(DataError, match="positive"):
        fit_correction(TABLE, some(2), [1.0, bad])


def test_replacements_give_the_table_that_the_latencies_were_made_of() -> None:
    rows = np.concatenate([SPACE.single_changes, some(3)])
    table = replacements(SPACE, rows, (0.7 + TABLE.sums(rows)).tolist())
    assert table is not None
    np.testing.assert_allclose(table.base + table.sums(SPACE.all_rows), 0.7 + TABLE.sums(SPACE.all_rows))
    assert replacements(SPACE, rows[1:], (0.7 + TABLE.sums(rows[1:])).tolist()) is None


def test_the_table_is_taken_where_it_misses_less_than_terms_of_options() -> None:
    rows = np.concatenate([SPACE.single_changes, some(12)])
    generator = np.random.default_rng(2)
    truth = 0.7 + TABLE.sums(SPACE.all_rows)
    measured = (0.7 + TABLE.sums(rows)) * generator.lognormal(sigma=0.01, size=len(rows))
    predictor = best_fit(SPACE, rows, measured.tolist())
    assert predictor.error is not None
    assert predictor.error < 0.05
    assert np.median(np.abs(predictor.predict(SPACE.all_rows) / truth - 1)) < 0.05
