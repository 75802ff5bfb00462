from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from omgoptim.errors import ArtifactError
from omgoptim.models.output_check import CHECK, OutputCheck, max_difference, read_check, verify_outputs, write_check

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 1e-6], 1.0),
        ([INF, 2.0], [INF, 1.0], 0.5),
        ([-INF, 2.0], [INF, 2.0], INF),
        ([INF, 2.0], [3.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], NAN),
        ([1.0, NAN], [1.0, NAN], NAN),
        ([1.0], [1.0, 2.0], INF),
        ([], [], 0.0),
    ],
)
def test_a_difference_is_relative_to_the_outputs_scale(
    expected: list[float], actual: list[float], difference: float
) -> None:
    assert_array_equal(max_difference([np.array(expected)], [np.array(actual)]), difference)


def test_the_worst_output_counts_each_on_its_own_scale() -> None:
    large, small = np.array([1000.0]), np.array([1.0])
    assert max_difference([large, small], [large + 10, small + 0.5]) == 0.5
    assert max_difference([large, small], [large]) == INF
    assert np.isnan(max_difference([np.array([NAN]), small], [large, small + 9]))


def test_integers_and_booleans_are_compared_as_numbers() -> None:
    assert max_difference([np.array([True, False])], [np.array([True, True])]) == 1.0
    top = np.array([255], np.uint8)
    assert max_difference([top], [top - 255]) == 1.0


def test_a_check_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = OutputCheck({"x": np.ones((2, 3)), "out:0": np.arange(2)}, [np.full(2, index) for index in range(12)])
    write_check(tmp_path, written)
    read = read_check(tmp_path)
    assert set(read.batch) == {"x", "out:0"}
    assert [array[0] for array in read.outputs] == list(range(12))


@pytest.mark.parametrize("damage", ["half", "flip", "text", "missing"])
def test_a_damaged_or_missing_check_is_the_artifacts_error(tmp_path: Path, damage: str) -> None:
    write_check(tmp_path, OutputCheck({"x": np.ones((20, 30))}, [np.ones(2)]))
    path = tmp_path / CHECK
    whole = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flip":
        whole[1000] ^= 1
        path.write_bytes(whole)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "half" else b"no archive")
    with pytest.raises(ArtifactError, match="is damaged") as error:
        read_check(tmp_path)
    assert error.value.why.startswith("check.npz cannot be read")


def test_each_output_of_a_reopened_artifact_is_compared_on_its_own_scale(tmp_path: Path) -> None:
    large, small = np.array([100.0, 0.0]), np.array([1.0, -0.5])
    write_check(tmp_path, OutputCheck({"x": large}, [large, small]))
    session: Any = SimpleNamespace(run=lambda batch: [batch["x"] + 0.05, small + 0.0005])
    manifest: Any = SimpleNamespace(precision="float32")
    assert verify_outputs(tmp_path, manifest, session) == pytest.approx([0.0005, 0.0005])
    session = SimpleNamespace(run=lambda batch: [batch["x"], small + 0.05])
    with pytest.raises(ArtifactError, match="does not reproduce its recorded outputs"):
        verify_outputs(tmp_path, manifest, session)
