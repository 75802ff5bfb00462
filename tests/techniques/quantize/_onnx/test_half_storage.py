from __future__ import annotations

import numpy as np
import pytest
import torch

from omgoptim.techniques.quantize._onnx.weight_storage import to_half


@pytest.mark.parametrize(("half", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_bits_are_those_that_torch_rounds_to(half, dtype):
    values = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32) * 100
    values[0, :5] = [0.0, -0.0, 1e-30, -np.inf, 1.00390625]  # the last lies halfway between two bfloat16
    want = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    got = to_half(values, half)
    assert got is not None
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("half", "value"), [("float16", 65520.0), ("bfloat16", np.finfo(np.float32).max)])
def test_a_finite_value_that_would_become_infinite_is_refused(half, value):
    assert to_half(np.array([1.0, value], np.float32), half) is None


def test_nan_stays_nan():
    for half, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        bits = to_half(np.array([np.nan, 1.0], np.float32), half)
        assert bits is not None
        assert torch.from_numpy(bits.view(np.int16)).view(dtype).isnan().tolist() == [True, False]
