"""Batch-norm statistics estimated again: their values, and everything that must stay as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.models.samples import Samples
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.training.batch_norm import reestimate


def signature(*shape: int) -> Signature:
    return Signature((InputTensor("x", "float32", ("batch", *shape), False),), "tensor")


def samples(*batches: Tensor) -> Samples:
    return Samples([{"x": batch.numpy()} for batch in batches], [None] * len(batches))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 5)),
        (nn.BatchNorm2d(4), (4, 3, 3)),
        (nn.BatchNorm3d(4), (4, 2, 3, 2)),
        (nn.SyncBatchNorm(4), (4, 3)),
    ],
    ids=str,
)
def test_the_statistics_are_the_averages_of_the_batches_own(layer: Any, shape: tuple[int, ...]) -> None:
    batches = [drawn(40, *shape, seed=seed) for seed in range(3)]
    assert reestimate(nn.Sequential(layer), signature(*shape), samples(*batches)) == 1
    by_channel = [batch.transpose(0, 1).flatten(1) for batch in batches]
    assert torch.allclose(layer.running_mean, torch.stack([b.mean(1) for b in by_channel]).mean(0), atol=1e-5)
    assert torch.allclose(layer.running_var, torch.stack([b.var(1) for b in by_channel]).mean(0), rtol=1e-4)


def test_each_layer_sees_what_the_ones_before_it_give_with_the_statistics_of_the_batch() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
    x = drawn(64, 3)
    assert reestimate(net, signature(3), samples(x)) == 2
    normal = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(net[2].running_var, net[1](normal).detach().var(0), rtol=1e-3)
    assert torch.allclose(net[2].running_mean, torch.zeros(2), atol=1e-5)


def test_the_order_of_the_batches_hardly_matters() -> None:
    batches = [drawn(32, 3, seed=seed) for seed in range(5)]
    forward, backward = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    reestimate(forward, signature(3), samples(*batches))
    reestimate(backward, signature(3), samples(*reversed(batches)))
    assert torch.allclose(forward[0].running_mean, backward[0].running_mean, rtol=1e-5)
    assert torch.allclose(forward[0].running_var, backward[0].running_var, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
def test_modes_momentum_weights_and_dropout_are_left_alone(momentum: float | None) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 2))
    net.train()
    net[3].eval()
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    x = drawn(50, 3)
    reestimate(net, signature(3), samples(x))
    assert torch.allclose(net[2].running_mean, net[0](x).detach().mean(0), atol=1e-5)  # no dropout
    assert [layer.training for layer in net] == [True, True, True, False]
    assert net[2].momentum == momentum
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_small_batches_are_joined_so_that_batches_of_one_serve_too() -> None:
    x = drawn(64, 3)
    whole, single = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    reestimate(whole, signature(3), samples(*x.split(32)))
    assert reestimate(single, signature(3), samples(*x.split(1))) == 1
    assert torch.equal(whole[0].running_mean, single[0].running_mean)
    assert torch.equal(whole[0].running_var, single[0].running_var)


def test_batches_of_other_lengths_are_not_joined() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3))
    assert reestimate(net, signature(3, "length"), samples(drawn(4, 3, 5), drawn(4, 3, 7))) == 1  # type: ignore[arg-type]
    assert int(net[0].num_batches_tracked) == 2


def test_a_single_sample_and_no_batch_leave_everything_as_it_was() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3))
    net[0].running_mean.fill_(7.0)
    assert reestimate(net, signature(3), samples(drawn(1, 3))) == 0
    assert reestimate(net, signature(3), Samples([], [])) == 0
    assert net[0].running_mean.tolist() == [7.0] * 3


def test_layers_without_statistics_other_norms_and_layers_that_do_not_run_are_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.without = nn.BatchNorm1d(3, track_running_stats=False)
            self.instance = nn.InstanceNorm1d(3, track_running_stats=True)

        def forward(self, x: Tensor) -> Tensor:
            given: Tensor = self.instance(self.without(self.used(x)))
            return given

    net = Net()
    net.unused.running_var.fill_(5.0)
    net.unused.num_batches_tracked.fill_(9)
    assert reestimate(net, signature(3, 4), samples(drawn(32, 3, 4))) == 1
    assert net.unused.running_var.tolist() == [5.0] * 3
    assert int(net.unused.num_batches_tracked) == 9
    assert net.instance.running_mean.tolist() == [0.0] * 3


def test_modes_and_momentum_are_put_back_when_the_forward_fails() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(99, 1))
    net.eval()
    with pytest.raises(RuntimeError):
        reestimate(net, signature(3), samples(drawn(32, 3)))
    assert net[0].momentum == 0.1
    assert not net[0].training


def test_no_target_is_read() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3))
    reestimate(net, signature(3), Samples([{"x": np.ones((32, 3), np.float32)}], [object()]))
    assert net[0].running_mean.tolist() == pytest.approx([1.0] * 3)
