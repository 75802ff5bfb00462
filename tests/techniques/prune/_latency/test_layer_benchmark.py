from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.models.samples import Samples
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.prune._latency import layer_benchmark as layer_bench
from omgoptim.techniques.prune._latency.layer_benchmark import SizedLayer, bench_of, measure_tile_size, visits
from omgoptim.techniques.registry import ModuleRun


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
        return {point.key: 1.0 + -(-point.outside // 16) for point in points}

    monkeypatch.setattr(layer_bench, "visits", of_sixteen)
    assert measure_tile_size(nn.Linear(4, 4), run_on("torch_eager", tmp_path)) == 16


def test_a_program_pays_for_its_call_and_a_module_does_not(tmp_path: Path) -> None:
    with bench_of(run_on("torch_eager", tmp_path)) as bench:
        assert bench.empty_call_ms() == 0.0
    with bench_of(run_on("onnxruntime", tmp_path)) as bench:
        assert bench.empty_call_ms() > 0.0


def test_visits_stop_at_the_end_of_the_time(tmp_path: Path) -> None:
    points = [SizedLayer(nn.Linear(4, out), (1, 4), 4, out) for out in (1, 2, 3)]
    with bench_of(run_on("torch_eager", tmp_path)) as bench:
        assert visits(points, bench, 1e-4, seed=0, end=0.0) == {}
        assert set(visits(points, bench, 1e-4, seed=0)) == {point.key for point in points}


def test_the_scratch_folder_is_left_empty_and_the_threads_as_they_were(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    with bench_of(run_on("onnxruntime", tmp_path)) as bench:
        visits([SizedLayer(nn.Linear(4, 2), (1, 4), 4, 2)], bench, 1e-4, seed=0)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads
