from __future__ import annotations

import numpy as np
import pytest

from omgoptim.errors import DataError
from omgoptim.models.onnx_file import load
from omgoptim.techniques.quantize._ptq.calibration import batches_for
from omgoptim.techniques.registry import ProgramRun


def test_batches_are_cut_to_the_samples_asked_for(program, tmp_path):
    run = ProgramRun([{"x": program("mlp").sample(8, seed)} for seed in range(4)], tmp_path)
    batches = batches_for(load(program("mlp").path), run, 12)
    assert [len(batch["x"]) for batch in batches] == [8, 4]


def test_names_the_model_does_not_take_are_left_out(program, tmp_path):
    run = ProgramRun([{"x": program("mlp").sample(8, 0), "target": np.zeros(8)}], tmp_path)
    assert [set(batch) for batch in batches_for(load(program("mlp").path), run, 8)] == [{"x"}]


def test_a_missing_input_is_an_error_that_names_it(program, tmp_path):
    run = ProgramRun([{"image": program("mlp").sample(8, 0)}], tmp_path)
    with pytest.raises(DataError, match="lacks the input 'x'") as caught:
        batches_for(load(program("mlp").path), run, 8)
    assert "image" in caught.value.why


def test_batches_without_samples_are_as_good_as_none(program, tmp_path):
    run = ProgramRun([{"x": np.zeros((0, 32), np.float32)}], tmp_path)
    with pytest.raises(DataError, match="needs calibration data"):
        batches_for(load(program("mlp").path), run, 8)
