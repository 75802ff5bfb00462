from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import batches_of, blobs, evaluator_of, fit, net, same, state
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from omgoptim.errors import TechniqueError
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.training._loop.checkpoints import all_tensors
from omgoptim.training.config import TrainingConfig
from omgoptim.training.fake_quantization import (
    NORMS_FROZEN,
    RANGES_FIXED,
    FakeQuantized,
    IntegerFormats,
    fake_quantize,
    input_scale,
    weight_scale,
)
from omgoptim.training.loop import TrainingResult
from omgoptim.training.losses import loss_of

X, Y = blobs()
BATCHES = 6
"""Batches of 16 samples in an epoch."""


def calls(count: int = 4) -> list[Any]:
    return [((part,), {}) for part in X.split(16)[:count]]


def calibrated(module: nn.Module, steps: int = 12, **simulation: Any) -> FakeQuantized:
    made = FakeQuantized(module, IntegerFormats(**simulation), steps)
    made.calibrate(calls())
    return made


def learnt(module: nn.Module, epochs: int, eval_mode: bool = True, **more: Any) -> TrainingResult:
    inside = module.module if isinstance(module, FakeQuantized) else module
    assert isinstance(inside, nn.Module)
    loss = loss_of(RequestedFunction("auto", PathPolicy.of(Path.cwd(), []), 60.0), inside(X[:8]), Y[:8])
    evaluator = evaluator_of(inside, X, Y) if eval_mode else None
    return fit(module, batches_of(inside, X, Y), loss, TrainingConfig(epochs=epochs, batch=16), evaluator, **more)


def test_weights_are_rounded_to_what_a_hand_computes() -> None:
    weight = torch.tensor([[1.27, -0.504], [-0.25, 0.1]])  # steps of 0.01 and of 0.25 / 127
    rounded = fake_quantize(weight, weight_scale(weight, 0), torch.zeros(()), -127, 127)
    step = 0.25 / 127
    torch.testing.assert_close(rounded, torch.tensor([[1.27, -0.50], [-0.25, 51 * step]]))
    whole = fake_quantize(weight, weight_scale(weight, None), torch.zeros(()), -127, 127)
    torch.testing.assert_close(whole, torch.tensor([[1.27, -0.50], [-0.25, 0.10]]))


def test_inputs_are_rounded_to_what_a_hand_computes() -> None:
    scale, zero = input_scale(torch.tensor(-1.0), torch.tensor(4.1), symmetric=False)
    assert (float(scale), float(zero)) == (pytest.approx(0.02), 50.0)
    x = torch.tensor([-2.0, -1.0, 0.0, 0.031, 4.1, 9.0])
    expected = torch.tensor([-1.0, -1.0, 0.0, 0.04, 4.1, 4.1])
    torch.testing.assert_close(fake_quantize(x, scale, zero, 0, 255), expected)
    scale, zero = input_scale(torch.tensor(0.5), torch.tensor(2.54), symmetric=True)
    assert (float(scale), float(zero)) == (pytest.approx(0.02), 0.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_rounding_is_torchs_own_per_channel(axis: int) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scale = weight_scale(weight, axis)
    zeros = torch.zeros(scale.numel(), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale.flatten(), zeros, axis, -127, 127)
    torch.testing.assert_close(fake_quantize(weight, scale, torch.zeros_like(scale), -127, 127), expected)


def test_the_gradient_passes_inside_the_range_and_stops_outside() -> None:
    x = torch.tensor([-0.3, 0.004, 0.2, 2.9], requires_grad=True)
    (fake_quantize(x, torch.tensor(0.01), torch.tensor(0.0), 0, 255) * torch.arange(1.0, 5.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0]


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 3)
    assert torch.equal(fake_quantize(weight, weight_scale(weight, 0), torch.zeros(()), -127, 127), weight)


@pytest.mark.parametrize("bias", [True, False])
def test_rounding_a_channel_and_folding_batch_normalization_commute(bias: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias).eval(), nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -0.7, 1e-3, 30.0, 1.0]))  # a negative factor turns a channel round
        norm.running_var.uniform_(0.2, 3)

    def rounded(layer: nn.Conv2d) -> nn.Conv2d:
        made = copy.deepcopy(layer)
        scale = weight_scale(layer.weight, 0)
        made.weight.data = fake_quantize(layer.weight.data, scale, torch.zeros_like(scale), -127, 127)
        return made

    first, last = fuse_conv_bn_eval(rounded(conv), norm), rounded(fuse_conv_bn_eval(conv, norm))
    torch.testing.assert_close(first.weight, last.weight, rtol=1e-5, atol=1e-7)


def test_the_module_runs_as_if_it_were_int8_and_stays_plain() -> None:
    module = net()
    before, plain = state(module), module(X[:64]).detach()
    made = calibrated(module).eval()
    simulated = made(X[:64]).detach()
    assert 0 < float((simulated - plain).abs().max()) < 0.05
    assert same(before, state(module))
    assert torch.equal(module(X[:64]), plain)
    assert [type(layer) for layer in module.modules()] == [type(layer) for layer in net().modules()]
    assert not any(layer._forward_pre_hooks for layer in made.modules())
    assert set(module.state_dict()) == set(net().state_dict())


def test_what_is_simulated_is_each_layers_input_and_weight() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    made = calibrated(module).eval()
    part = X[:64]

    def quantized(x: torch.Tensor, layer: Any, index: int) -> torch.Tensor:
        scale, zero = input_scale(made.low[index], made.high[index], symmetric=False)
        return nn.functional.linear(fake_quantize(x, scale, zero, 0, 255), weights[f"{2 * index}.weight"], layer.bias)

    weights = made.rounded_weights()
    hidden = torch.relu(quantized(part, module[0], 0))
    torch.testing.assert_close(made(part), quantized(hidden, module[2], 1))
    assert torch.equal(made.low[0], part.min())
    assert torch.equal(made.high[0], part.max())


def test_channels_that_conversion_will_scale_are_rounded_as_scaled() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    module[0].weight.data = torch.tensor([[1.0, 100.0], [2.0, -300.0]])
    x = torch.tensor([[1.27, 0.0127], [0.64, 0.0051]])
    factors = torch.tensor([1.0, 0.01])  # the second channel is a hundred times smaller
    made = FakeQuantized(module, IntegerFormats(symmetric=True, factors={"0": factors}), 1)
    made.calibrate([((x,), {})])
    assert float(made.high[0]) == pytest.approx(1.27)
    step = 3 / 127
    weights = torch.tensor([[1.0, 100.0], [round(2 / step) * step, -300.0]])
    torch.testing.assert_close(made.rounded_weights()["0.weight"], weights)
    expected = torch.tensor([[1.27, 0.0127], [0.64, 0.0051]]) @ weights.T  # all are whole steps of 0.01 and 0.0001
    torch.testing.assert_close(made.eval()(x), expected)
    assert made.ranges() == {"0": (0.0, pytest.approx(1.27))}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 2),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Linear(4, 3),
    ],
)
def test_factors_reach_the_channels_they_are_of_and_cancel(layer: nn.Module) -> None:
    module = nn.Sequential(layer).eval()
    size = [2, 4, *[5] * (layer.weight.ndim - 2)] if not isinstance(layer, nn.Linear) else [2, 4]
    factors = torch.tensor([1.0, 30.0, 0.2, 5.0])
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * factors.reshape(4, *[1] * (len(size) - 2))
    fine = IntegerFormats(weight_levels=2**20, factors={"0": factors})
    made = FakeQuantized(module, fine, 1)
    made.calibrate([((x,), {})])
    torch.testing.assert_close(made.rounded_weights()["0.weight"], layer.weight, rtol=0, atol=1e-4)
    assert float((made.eval()(x) - module(x)).detach().abs().max()) < 0.02 * float(module(x).detach().abs().max())


def test_ranges_move_then_stay_and_batch_normalization_freezes_before() -> None:
    module, steps = net(), 12
    made = calibrated(module, steps).train()
    frozen, moved = [], []
    for _ in range(steps):
        ranges, statistics = made.high.clone(), module.norm.running_mean.clone()
        made(5 * X[:16])
        moved.append(not torch.equal(ranges, made.high))
        frozen.append(torch.equal(statistics, module.norm.running_mean))
    assert moved == [step <= RANGES_FIXED * steps for step in range(1, steps + 1)]
    assert frozen == [step > NORMS_FROZEN * steps for step in range(1, steps + 1)]
    assert NORMS_FROZEN < RANGES_FIXED


def test_training_leaves_modes_flags_and_the_plain_module() -> None:
    module = net()
    module.norm.train()
    made = calibrated(module)
    fitted = learnt(made, 3)
    assert fitted.quality is not None
    assert fitted.quality_before is not None
    assert fitted.quality >= fitted.quality_before
    assert [layer.training for layer in module.modules()] == [False, False, True, False, False]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert not same(state(module), state(net()))


def test_a_resumed_training_is_an_uninterrupted_one_bit_for_bit_ranges_included(tmp_path: Path) -> None:
    whole = calibrated(net(), 4 * BATCHES)
    learnt(whole, 4, eval_mode=False)

    class Cut(Exception):
        pass

    def cut(stage: str, _done: float | None) -> None:
        if "epoch 3" in stage:
            raise Cut

    broken = calibrated(net(), 4 * BATCHES)
    with pytest.raises(Cut):
        learnt(broken, 4, eval_mode=False, checkpoints=tmp_path, progress=cut)
    resumed = calibrated(net(), 4 * BATCHES)
    fitted = learnt(resumed, 4, eval_mode=False, checkpoints=tmp_path)
    assert fitted.resumed == 1
    assert int(resumed.steps_done) == int(whole.steps_done) == 4 * BATCHES
    assert same(all_tensors(whole), all_tensors(resumed))


def test_a_transposed_convolutions_channels_are_those_of_its_output() -> None:
    module = nn.Sequential(nn.ConvTranspose1d(2, 3, 2)).eval()
    rounded = FakeQuantized(module, IntegerFormats(), 1).rounded_weights()["0.weight"]
    steps = rounded / (module[0].weight.detach().abs().amax((0, 2), keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_targets_and_ignore_choose_the_layers_and_no_layer_is_an_error() -> None:
    assert list(FakeQuantized(net(), IntegerFormats(targets=["fc"]), 1).layers) == ["fc"]
    assert list(FakeQuantized(net(), IntegerFormats(ignore=["fc"]), 1).layers) == ["out"]
    with pytest.raises(TechniqueError, match="exclude every layer"):
        FakeQuantized(net(), IntegerFormats(ignore=["*"]), 1)
    with pytest.raises(TechniqueError, match="no layer that QAT supports"):
        FakeQuantized(nn.GRU(3, 4), IntegerFormats(), 1)


def test_tied_weights_are_rounded_in_both_places() -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).eval()
    module[1].weight = module[0].weight
    made = FakeQuantized(module, IntegerFormats(), 1)
    made.calibrate([((torch.arange(7)[None],), {})])
    heard: list[torch.Tensor] = []
    module[0].register_forward_hook(lambda _layer, _args, output: heard.append(output))
    made.eval()(torch.arange(7)[None])
    torch.testing.assert_close(heard[-1][0], made.rounded_weights()["1.weight"])
    assert module[1].weight is module[0].weight
