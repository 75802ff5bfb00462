from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.techniques.prune._latency.layer_benchmark import (
    INPUT,
    SizedLayer,
    TimedLayer,
    as_module,
    fits,
    sides,
    signature_of,
    write_empty_program,
    write_program,
)

CASES: dict[str, tuple[TimedLayer, tuple[int, ...], int, int]] = {
    "linear on rows": (nn.Linear(8, 6), (1, 8), 4, 5),
    "linear on tokens": (nn.Linear(8, 6), (1, 7, 8), 4, 5),
    "linear on tokens without bias": (nn.Linear(8, 6, bias=False), (1, 7, 8), 3, 2),
    "convolution": (nn.Conv2d(8, 6, 3, padding=1), (1, 8, 9, 7), 4, 5),
    "strided, dilated, uneven": (nn.Conv2d(8, 6, (3, 5), (2, 1), (0, 2), (2, 1), bias=False), (1, 8, 12, 10), 4, 5),
    "same padding": (nn.Conv2d(8, 6, (5, 3), padding="same", dilation=2), (1, 8, 9, 7), 4, 5),
    "grouped": (nn.Conv2d(8, 16, 3, groups=4), (1, 8, 9, 7), 4, 12),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 9, 7), 5, 5),
    "one dimension": (nn.Conv1d(8, 6, 5, 2, padding=1), (1, 8, 20), 4, 5),
    "transposed": (nn.ConvTranspose2d(8, 6, 3, 2, padding=1, output_padding=1), (1, 8, 5, 6), 4, 3),
    "transposed and grouped": (nn.ConvTranspose1d(8, 8, 4, 2, groups=2), (1, 8, 6), 6, 4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_program_computes_what_the_module_does(case: str, runtime: str, tmp_path: Path) -> None:
    """Oracle: torch, given the program's weights."""
    sized = SizedLayer(*CASES[case])
    module = as_module(sized, "cpu", seed=0)
    path = write_program(sized, tmp_path / "layer.onnx", seed=1)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    weight = torch.from_numpy(stored["weight"].copy())
    if len(sized.input_shape) > 2 and isinstance(module, nn.Linear):
        weight = weight.T
    module.load_state_dict({"weight": weight} | {n: torch.from_numpy(stored[n].copy()) for n in stored if n == "bias"})
    x = np.random.default_rng(2).standard_normal(sized.input_shape, dtype=np.float32)
    session = ENGINES[runtime].open(path, signature_of(sized.input_shape), SessionSettings(threads=1))
    expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run({INPUT: x})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_module_has_the_sizes_asked_for(case: str) -> None:
    sized = SizedLayer(*CASES[case])
    module = as_module(sized, "cpu", seed=0)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear))
    assert sides(module) == (sized.inside, sized.outside)
    assert tuple(module.weight.shape) == sized.weight_shape
    assert (module.bias is None) == (sized.layer.bias is None)
    assert all(bool(parameter.isfinite().all()) and not parameter.requires_grad for parameter in module.parameters())


def test_a_module_keeps_the_dtype_of_the_layer() -> None:
    assert as_module(SizedLayer(nn.Linear(4, 4).bfloat16(), (1, 4), 2, 2), "cpu", 0).weight.dtype == torch.bfloat16


def test_a_subclass_is_timed_as_what_it_is_a_kind_of() -> None:
    class Own(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)

    assert type(as_module(SizedLayer(Own(), (1, 4, 3, 3), 2, 2), "cpu", 0)) is nn.Conv2d


def test_convolution_groups_must_divide_both_sides() -> None:
    grouped = nn.Conv2d(8, 16, 3, groups=4)
    assert fits(grouped, 4, 12)
    assert not fits(grouped, 6, 12)
    assert not fits(grouped, 4, 6)
    assert fits(nn.Conv2d(8, 8, 3, groups=8), 5, 5)
    assert fits(nn.Linear(8, 8), 3, 7)


def test_only_layers_that_take_the_same_time_have_the_same_key() -> None:
    one = SizedLayer(nn.Conv2d(8, 8, 3), (1, 8, 9, 9), 4, 4)
    assert one.key == SizedLayer(nn.Conv2d(8, 8, 3), (1, 8, 9, 9), 4, 4).key
    others = [
        SizedLayer(nn.Conv2d(8, 8, 3), (1, 8, 9, 9), 4, 5),
        SizedLayer(nn.Conv2d(8, 8, 3), (1, 8, 9, 9), 5, 4),
        SizedLayer(nn.Conv2d(8, 8, 3), (1, 8, 9, 8), 4, 4),
        SizedLayer(nn.Conv2d(8, 8, 3, stride=2), (1, 8, 9, 9), 4, 4),
        SizedLayer(nn.Conv2d(8, 8, 3, bias=False), (1, 8, 9, 9), 4, 4),
        SizedLayer(nn.Conv2d(8, 8, 3, groups=2), (1, 8, 9, 9), 4, 4),
        SizedLayer(nn.ConvTranspose2d(8, 8, 3), (1, 8, 9, 9), 4, 4),
    ]
    assert len({one.key, *(other.key for other in others)}) == 8


def test_the_empty_program_runs(tmp_path: Path) -> None:
    path = write_empty_program(tmp_path / "empty.onnx")
    session = ENGINES["onnxruntime"].open(path, signature_of((1, 1)), SessionSettings(threads=1))
    assert session.run({INPUT: np.full((1, 1), -2, np.float32)})[0].tolist() == [[0.0]]
