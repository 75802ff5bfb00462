"""Single layers at chosen widths, and their benchmark on engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.models.samples import Samples
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.prune._latency import layer_benchmark as layer_bench
from omgoptim.techniques.prune._latency.layer_benchmark import (
    INPUT,
    SizedLayer,
    TimedLayer,
    as_module,
    fits,
    measure_tile_size,
    open_bench,
    sides,
    signature_of,
    time_points,
    write_empty_program,
    write_program,
)
from omgoptim.techniques.registry import ModuleRun

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
    """Oracle: torch."""
    sized = SizedLayer(*CASES[case])
    module = as_module(sized, "cpu", seed=0)
    path = write_program([module], sized.input_shape, tmp_path / "layer.onnx")
    x = np.random.default_rng(2).standard_normal(sized.input_shape, dtype=np.float32)
    session = ENGINES[runtime].open(path, signature_of(sized.input_shape), SessionSettings(threads=1))
    expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run({INPUT: x})[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_module_has_the_sizes_asked_for(case: str) -> None:
    sized = SizedLayer(*CASES[case])
    module = as_module(sized, "cpu", seed=0)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear))
    assert sides(module) == (sized.in_size, sized.out_size)
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


def run_on(runtime: str, scratch: Path) -> ModuleRun:
    signature = Signature((InputTensor("x", "float32", ("batch", 4), False),), "tensor")
    samples = Samples([{"x": np.zeros((2, 4), np.float32)}], [None])
    return ModuleRun(signature, samples, lambda out, _: out.sum(), nn.Identity(), scratch, runtime=runtime)


@pytest.mark.parametrize("module", [nn.Conv2d(1, 4, 3), nn.Linear(4, 4)], ids=["convolutions", "linear"])
def test_the_rounding_is_a_block_that_kernels_work_in(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_bench, "LONGEST_BLOCK_S", 0.0005)
    assert measure_tile_size(module, run_on("torch_eager", tmp_path)) in (8, 16, 32)


def test_the_rounding_follows_the_measured_stairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_sixteen(points: list[SizedLayer], *_: object) -> dict[object, float]:
        return {point.key: 1.0 + -(-point.out_size // 16) for point in points}

    monkeypatch.setattr(layer_bench, "time_points", of_sixteen)
    assert measure_tile_size(nn.Linear(4, 4), run_on("torch_eager", tmp_path)) == 16


def test_a_program_pays_for_its_call_and_a_module_does_not(tmp_path: Path) -> None:
    with open_bench(run_on("torch_eager", tmp_path)) as bench:
        assert bench.empty_call_ms() == 0.0
    with open_bench(run_on("onnxruntime", tmp_path)) as bench:
        assert bench.empty_call_ms() > 0.0


def test_visits_stop_at_the_end_of_the_time(tmp_path: Path) -> None:
    points = [SizedLayer(nn.Linear(4, out), (1, 4), 4, out) for out in (1, 2, 3)]
    with open_bench(run_on("torch_eager", tmp_path)) as bench:
        assert time_points(points, bench, 1e-4, seed=0, end=0.0) == {}
        assert set(time_points(points, bench, 1e-4, seed=0)) == {point.key for point in points}


def test_the_scratch_folder_is_left_empty_and_the_threads_as_they_were(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with open_bench(run_on("onnxruntime", tmp_path)) as bench:
        time_points([SizedLayer(nn.Linear(4, 2), (1, 4), 4, 2)], bench, 1e-4, seed=0)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads
