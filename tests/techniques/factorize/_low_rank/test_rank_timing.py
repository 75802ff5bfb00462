from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.blocks import LowRankLinear, SpatialConv2d, Tucker2Conv2d
from omgoptim.measure.size import count_params
from omgoptim.reports import Skip
from omgoptim.requests.factorize import Svd
from omgoptim.techniques.factorize._low_rank import rank_allocation
from omgoptim.techniques.factorize._low_rank.problem import RankOption
from omgoptim.techniques.factorize._low_rank.rank_allocation import (
    RankChoice,
    RankTimes,
    measure_times,
    options_to_measure,
    with_times,
)
from omgoptim.techniques.prune._latency.layer_benchmark import write_program

RunOf = Callable[..., Any]


def layered(params: int, per_rank: int, ranks: range) -> RankChoice:
    options = tuple(RankOption("linear", (r,), r * per_rank, 1.0 / r) for r in ranks)
    return RankChoice(params, options, tuple(option.error for option in options))


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (LowRankLinear(6, 5, 2), (2, 3, 6)),
        (LowRankLinear(6, 5, 2, bias=False), (2, 6)),
        (SpatialConv2d(4, 6, (3, 5), 2, stride=(2, 1), padding=(1, 2), groups=2), (2, 4, 9, 8)),
        (SpatialConv2d(4, 6, 3, 2, padding="same", dilation=2), (2, 4, 9, 8)),
        (Tucker2Conv2d(4, 6, 3, 2, 3, padding=1, bias=False), (2, 4, 9, 8)),
    ],
)
def test_the_program_of_a_block_gives_what_the_block_gives(
    block: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Oracle: ONNX Runtime against torch."""
    import onnxruntime

    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    program = write_program(list(block.children()), shape, tmp_path / "block.onnx")
    (given,) = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(given, block(torch.from_numpy(x)).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_between_measured_ranks_the_time_is_interpolated_and_never_falls() -> None:
    """By hand: 1, 0.8 and 3 ms at 10, 20 and 30 weights: the fall is smoothed; 2 ms at 25; the layer takes 2.5."""
    one = layered(100, 5, range(2, 7))
    timed = with_times(one, [one.options[0], one.options[2], one.options[4]], RankTimes(2.5, (1.0, 0.8, 3.0)))
    assert [option.params for option in timed.options] == [10, 15, 20, 25]
    assert timed.times_ms == pytest.approx((1.0, 1.0, 1.0, 2.0), abs=1e-4)
    assert list(timed.times_ms or ()) == sorted(timed.times_ms or ())
    assert timed.time_ms == 2.5


def test_the_smallest_and_the_largest_options_are_measured() -> None:
    options = layered(100, 1, range(1, 30)).options
    picked = options_to_measure(options)
    assert len(picked) == 6
    assert (picked[0], picked[-1]) == (options[0], options[-1])
    assert options_to_measure(options[:2]) == list(options[:2])


@pytest.mark.parametrize("runtime", ["torch_eager", "onnxruntime"])
def test_every_layer_is_either_timed_or_skipped_with_its_times(runtime: str, run_of: RunOf) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1024, 1024), nn.Conv2d(1, 1, 1)).eval()[:1]
    module.append(nn.Linear(1024, 4))
    run = run_of(module, runtime=runtime, input=torch.randn(2, 1024))
    skipped: list[Skip] = []
    layers = {"0": layered(2**20, 2048, range(8, 500, 16)), "1": layered(4096, 1028, range(1, 4))}
    timed = measure_times(module, layers, run, skipped)
    assert "0" in timed  # a hundredth of the weights at the smallest rank
    for path, one in timed.items():
        assert len(one.times_ms or ()) == len(one.options) == len(one.losses)
        assert all(ms < (one.time_ms or 0) for ms in one.times_ms or ()), path
    assert {*timed, *(skip.path for skip in skipped)} == {"0", "1"}
    assert all(f"no rank is faster on {runtime}" in skip.reason for skip in skipped)


def test_a_target_per_time_is_met_in_parameters(
    run_of: RunOf, factorized: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_parameters(layer: Any, picked: Any, *_: Any) -> RankTimes:  # clocks of a busy machine may leave few ranks
        return RankTimes(layer.weight.numel() * 1e-6, tuple(option.params * 1e-6 for option in picked))

    monkeypatch.setattr(rank_allocation, "measure_options", by_parameters)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
    run = run_of(module, input=torch.randn(4, 512))
    changed, _ = factorized(module, Svd(per="time", target_compression=3), run)
    assert 3 <= count_params(module)[0] / count_params(changed)[0] <= 3.06
