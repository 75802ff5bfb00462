from __future__ import annotations

import numpy as np
import pytest
from float_programs import two_layers

from omgoptim.errors import DataError
from omgoptim.techniques.quantize._onnx.qdq import quantization_parameters
from omgoptim.techniques.quantize._ptq.calibration import ActivationReader
from omgoptim.techniques.quantize._ptq.observers import (
    RangeObserver,
    compute_ranges,
    observe_activations,
    squared_error,
)

METHODS = ["minmax", "moving_average", "percentile", "mse", "entropy"]


def observed(*batches: np.ndarray) -> RangeObserver:
    seen = RangeObserver()
    for batch in batches:
        assert seen.add(batch.astype(np.float32), histogram=True)
    return seen


def test_scale_and_zero_point_of_a_range_by_hand():
    assert quantization_parameters((-1.0, 3.0), symmetric=False) == (4 / 255, 64)  # 1 / (4 / 255) = 63.75
    assert quantization_parameters((1.0, 3.0), symmetric=False) == (3 / 255, 0)  # 0 is always inside
    assert quantization_parameters((-1.0, 3.0), symmetric=True) == (3 / 127, 0)
    assert quantization_parameters((0.0, 0.0), symmetric=False) == (1.0, 0)


def test_minmax_is_the_extremes_and_moving_average_the_mean_of_the_batches_extremes():
    seen = observed(np.array([-1.0, 1.0]), np.array([-3.0, 5.0]))
    assert seen.range("minmax") == (-3.0, 5.0)
    assert seen.range("moving_average") == (-2.0, 3.0)


def test_slices_of_one_batch_count_as_one():
    seen = observed(np.array([-1.0, 1.0]))
    seen.add(np.array([-3.0, 5.0], np.float32), histogram=True, same_batch=True)
    assert seen.range("moving_average") == (-3.0, 5.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_range_holds_zero_and_lies_within_the_values(method):
    values = np.random.default_rng(0).normal(3.0, 1.0, 20_000).clip(0.5)
    low, high = observed(values).range(method)
    assert low == 0.0
    assert 1.0 < high <= values.max() + 1e-6


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_a_lone_outlier_is_clipped(method):
    values = np.concatenate([np.random.default_rng(0).uniform(0, 1, 400_000), [50.0]])
    assert observed(values).range("minmax")[1] == 50.0
    assert observed(values).range(method)[1] < 40.0


def test_mse_has_no_more_squared_error_than_any_range_of_a_brute_force_search():
    values = np.random.default_rng(0).laplace(0.2, 1.0, 20_000)
    seen = observed(values)
    centres, counts = seen.distribution()
    ours = squared_error(centres, counts, seen.range("mse"), symmetric=False)
    grid = np.linspace(0.1, 1.0, 25)
    brute = min(
        squared_error(centres, counts, (seen.low * a, seen.high * b), symmetric=False) for a in grid for b in grid
    )
    assert ours <= brute * 1.02


def test_a_histogram_that_grows_counts_every_value_once_where_it_belongs():
    seen = observed(np.full(10, 0.5), np.array([-7.0, 7.0]), np.array([0.0, 100.0]))
    centres, counts = seen.distribution()
    assert counts.sum() == 14
    assert seen.span >= 100
    width = 2 * seen.span / len(seen.counts)
    for value, count in [(0.5, 10), (-7.0, 1), (7.0, 1), (0.0, 1), (100.0, 1)]:
        near = np.abs(centres - value) <= width
        assert counts[near].sum() == count


def test_a_tensor_that_is_always_zero_has_an_empty_range():
    assert observed(np.zeros(5)).range("mse") == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_symmetric_ranges_quantize_with_a_zero_point_of_zero(method):
    bounds = observed(np.random.default_rng(0).normal(0.5, 1.0, 5_000)).range(method, symmetric=True)
    assert quantization_parameters(bounds, symmetric=True)[1] == 0


def test_observing_a_program_gives_the_range_of_every_float_tensor_whatever_the_slices():
    model = two_layers([[2, 0], [0, -1]], [0, 0], [[1, 1]], [0.5])
    x = np.array([[1, 2], [-3, 4], [2, -5]], np.float32)
    found = observe_activations(model, [{"x": x}])
    assert compute_ranges(found, "minmax") == {"x": (-5.0, 4.0), "h": (-6.0, 5.0), "a": (0.0, 5.0), "y": (0.0, 9.5)}
    halves = observe_activations(model, [{"x": x[:1]}, {"x": x[1:]}])
    assert compute_ranges(halves, "minmax") == compute_ranges(found, "minmax")


def test_an_overflow_inside_the_network_is_an_error_that_names_the_tensor():
    model = two_layers([[3e38, 3e38], [0, 1]], [0, 0], [[1, 1]], [0])
    with pytest.raises(DataError, match="'h' is not finite"):
        observe_activations(model, [{"x": np.ones((2, 2), np.float32)}])


def test_a_watch_reads_inner_tensors_in_slices_and_computes_nothing_else():
    model = two_layers([[2, 0], [0, -1]], [0, 0], [[1, 1]], [0])
    watch = ActivationReader(model, ["a", "x"], exact=True)
    assert [value.name for value in watch.session.get_outputs()] == ["a"]
    parts = list(watch.slices([{"x": np.array([[1, 1], [2, -2], [3, 3]], np.float32)}]))
    np.testing.assert_array_equal(np.concatenate([values["a"] for _, values in parts]), [[2, 0], [4, 2], [6, 0]])
    assert len(parts) == 2  # one sample to learn the size, then the rest
