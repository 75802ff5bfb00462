from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from omgoptim.blocks.lora import LoRAConv, LoRALinear


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapted(base: Any, **arguments: Any) -> Any:
    """An adapter that has learnt something: B is not zero any more."""
    block = LoRALinear if isinstance(base, nn.Linear) else LoRAConv
    made = block(base, generator=torch.Generator().manual_seed(1), **arguments)
    with torch.no_grad():
        made.lora_b.copy_(drawn(*made.lora_b.shape))
    return made


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, 1), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2, bias=False), (2, 4, 9, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="circular"), (2, 4, 7, 7)),
    (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
]


def test_an_adapter_starts_as_the_layer_it_wraps_and_trains_two_thin_weights() -> None:
    base = nn.Linear(5, 7)
    made = LoRALinear(copy.deepcopy(base), rank=2)
    x = drawn(3, 5)
    assert torch.equal(made(x), base(x))
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    assert (made.lora_a.shape, made.lora_b.shape) == ((2, 5), (7, 2))
    assert not made.lora_b.any()


def test_a_is_drawn_as_torch_initializes_a_linear() -> None:
    made = LoRALinear(nn.Linear(100, 100), rank=100, generator=torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(100)
    expected = torch.empty(100, 100)
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.lora_a.detach(), expected)
    assert made.lora_a.abs().max() <= bound


def test_merged_it_gives_the_same_to_float_tolerance() -> None:
    base = nn.Linear(5, 7)
    before, identity = base.weight.detach().clone(), base
    made = adapted(base, rank=2, alpha=8.0)
    x = drawn(3, 5, seed=3)
    outputs = made(x).detach()
    expected = before + 4.0 * made.lora_b @ made.lora_a
    plain = made.merge()
    assert plain is identity
    torch.testing.assert_close(plain.weight, expected)
    torch.testing.assert_close(plain(x), outputs)
    torch.testing.assert_close(made(x), outputs)
    made.merge()
    torch.testing.assert_close(plain.weight, expected)


@pytest.mark.parametrize(("base", "shape"), CONVOLUTIONS)
def test_convolutions_merge_exactly_whatever_their_geometry(base: nn.Module, shape: tuple[int, ...]) -> None:
    base = copy.deepcopy(base)
    original = copy.deepcopy(base)
    made = adapted(base, rank=2)
    x = drawn(*shape)
    outputs = made(x).detach()
    assert not torch.allclose(outputs, original(x))
    torch.testing.assert_close(made.merge()(x), outputs)


def test_a_mask_keeps_zeros_of_the_merged_weight_zero() -> None:
    for base, x in ((nn.Linear(5, 7), drawn(3, 5)), (nn.Conv2d(2, 3, 3), drawn(2, 2, 5, 5))):
        with torch.no_grad():
            base.weight[drawn(*base.weight.shape) < 0] = 0
        kept = base.weight != 0
        made = adapted(base, rank=2, mask=kept)
        outputs = made(x).detach()
        plain = made.merge()
        assert torch.equal(plain.weight != 0, kept)
        assert not torch.signbit(plain.weight[~kept]).any()
        torch.testing.assert_close(plain(x), outputs)


def test_the_rank_is_cut_to_what_the_weight_can_have() -> None:
    assert LoRALinear(nn.Linear(3, 7), rank=8).rank == 3
    assert LoRAConv(nn.Conv2d(1, 20, 3), rank=50).rank == 9
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(nn.Linear(3, 7), rank=0)
    with pytest.raises(ValueError, match="mask"):
        LoRALinear(nn.Linear(3, 7), mask=torch.ones(3, 7))


def test_code_that_reads_the_weight_itself_sees_the_product_and_its_gradient() -> None:
    made = adapted(nn.Linear(5, 7))
    x = drawn(3, 5)
    read = nn.functional.linear(x, made.weight, made.bias)
    torch.testing.assert_close(read, made(x))
    read.sum().backward()
    assert made.lora_b.grad is not None
    assert made.lora_b.grad.any()
    assert (made.in_features, made.out_features) == (5, 7)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_it_gives_what_pefts_lora_gives_with_the_same_weights(kind: str) -> None:
    peft = pytest.importorskip("peft")
    base = nn.Linear(5, 7) if kind == "linear" else nn.Conv2d(3, 7, 3, padding=1)
    x = drawn(4, 5) if kind == "linear" else drawn(2, 3, 6, 6)
    made = adapted(copy.deepcopy(base), rank=2, alpha=6.0)
    theirs = nn.Sequential(copy.deepcopy(base))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), theirs)
    layer: Any = theirs[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(made.lora_a.reshape(layer.lora_A["default"].weight.shape))
        layer.lora_B["default"].weight.copy_(made.lora_b.reshape(layer.lora_B["default"].weight.shape))
    torch.testing.assert_close(made(x), theirs(x))
    layer.merge()
    torch.testing.assert_close(made.merge().weight, layer.get_base_layer().weight)
