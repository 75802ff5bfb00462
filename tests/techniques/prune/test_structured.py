from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import DataError, TechniqueError
from omgoptim.measure.macs import count_macs
from omgoptim.models.structural_diff import StructuralDiff, apply_diff, compute_diff
from omgoptim.requests.prune import Structured
from omgoptim.runtimes.torch_precision import load_state, state_of
from omgoptim.techniques.prune.structured import apply
from omgoptim.techniques.registry import ModuleRun, apply_to_module

RunOf = Callable[..., ModuleRun]
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LARGER = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=20,
    )
    module: nn.Module = transformers.BertForSequenceClassification(config)
    return module


TOKENS = {"input_ids": torch.arange(14).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
CASES: list[tuple[Callable[[], nn.Module], Tensor | dict[str, Tensor]]] = [
    (nets.Residual, IMAGES),
    (nets.Branches, IMAGES),
    (nets.mobile, LARGER),
    (lambda: nets.Vit(24, nets.FusedAttention(24, 4), nets.SplitAttention(24, 4, 2)), LARGER),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)),
    (bert, TOKENS),
]


def called(module: nn.Module, x: Tensor | dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = module(**x) if isinstance(x, dict) else module(x)
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


@pytest.mark.parametrize(("build", "x"), CASES)
def test_a_model_loses_a_third_runs_and_comes_back_from_its_recipe_bit_for_bit(
    build: Callable[[], nn.Module], x: Tensor | dict[str, Tensor], run_of: RunOf
) -> None:
    torch.manual_seed(0)
    module = build().eval()
    fresh = copy.deepcopy(module)
    run = run_of(module, [x])
    outcome = apply_to_module(module, Structured(pruning_ratio=0.3), run)
    assert outcome.changed
    smaller = sum(tensor.numel() for tensor in module.parameters())
    assert smaller < 0.9 * sum(tensor.numel() for tensor in fresh.parameters())
    assert called(module, x).shape == called(fresh, x).shape
    diff = compute_diff(fresh, module)
    assert diff is not None
    apply_diff(fresh, StructuralDiff.from_json(json.loads(json.dumps(diff.to_json()))))
    load_state(fresh, {name: tensor.clone() for name, tensor in state_of(module).items()})
    assert torch.equal(called(fresh, x), called(module, x))


def test_widths_and_operations_are_those_counted_by_hand(run_of: RunOf) -> None:
    module = nets.Residual(8).eval()
    apply(module, Structured(pruning_ratio=0.5), run_of(module, [IMAGES]))
    assert (module.stem.out_channels, module.bn.num_features) == (4, 4)
    assert (module.conv1.in_channels, module.conv1.out_channels) == (4, 8)
    assert (module.conv2.in_channels, module.conv2.out_channels) == (8, 4)
    assert (module.head.in_features, module.head.out_features) == (4, 5)
    by_hand = 64 * 9 * (3 * 4 + 4 * 8 + 8 * 4) + 4 * 5  # 8x8 positions, 3x3 kernels
    assert count_macs(module, (IMAGES,), {}).macs == by_hand


def test_a_second_round_reaches_the_ratio_of_the_original_widths(run_of: RunOf) -> None:
    module = nets.Residual(20).eval()
    run = run_of(module, [IMAGES])
    params = Structured(round_to=1)
    apply(module, params.model_copy(update={"pruning_ratio": 0.25}), run)
    assert (module.stem.out_channels, module.conv1.out_channels) == (15, 30)
    outcome = apply(module, params.model_copy(update={"pruning_ratio": 0.5}), run)
    assert (module.stem.out_channels, module.conv1.out_channels) == (10, 20)
    assert ("conv1", "channels", "30", "20") in {(c.path, c.what, c.before, c.after) for c in outcome.changed}


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_a_target_of_operations_is_met_closely_and_never_missed(ratio: float, run_of: RunOf) -> None:
    module = nets.Residual(24).eval()
    full = count_macs(module, (IMAGES,), {}).macs
    apply(module, Structured(target_macs_ratio=ratio, reconstruct=False), run_of(module, [IMAGES]))
    left = count_macs(module, (IMAGES,), {}).macs
    assert full is not None
    assert left is not None
    assert 0.98 * full / ratio <= left <= full / ratio


@pytest.mark.parametrize("importance", ["magnitude", "random", "taylor"])
def test_the_same_seed_gives_the_same_model(importance: str, run_of: RunOf) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        module = nets.Residual().eval()
        torch.rand(int(torch.randint(100, ())))  # whatever global randomness is left
        apply(module, Structured(importance=importance), run_of(module, [IMAGES], seed=5))  # type: ignore[arg-type]
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_reconstruction_brings_the_outputs_nearer_and_is_noted(run_of: RunOf) -> None:
    torch.manual_seed(0)
    module = nets.Residual().eval()
    run, expected = run_of(module, [IMAGES]), called(module, IMAGES)
    apart = {}
    for on in (True, False):
        twin = copy.deepcopy(module)
        outcome = apply(twin, Structured(pruning_ratio=0.3, reconstruct=on), run)
        apart[on] = float((called(twin, IMAGES) - expected).square().mean())
        fitted = "3 layers with pruned inputs were fitted by least squares to the unpruned outputs; "
        fitted += "no labels were used."
        assert outcome.notes == ([fitted] if on else [])
    assert apart[True] < 0.5 * apart[False]


def test_random_inputs_fit_nothing_and_give_no_gradients(run_of: RunOf) -> None:
    module = nets.Residual().eval()
    run = replace(run_of(module, [IMAGES]), real=False)
    twin = copy.deepcopy(module)
    apply(twin, Structured(reconstruct=False), run)
    assert apply(module, Structured(), run).notes == []
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in module.state_dict().items())
    with pytest.raises(DataError, match="taylor needs data"):
        apply(nets.Residual().eval(), Structured(importance="taylor"), run)


class AllHardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.conv(x)).view(-1, 512))


def test_a_model_that_reshapes_to_numbers_is_refused_by_line_and_with_a_way_out(run_of: RunOf) -> None:
    module = AllHardCoded().eval()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TechniqueError, match="no channel or head of this model can be removed") as refused:
        apply(module, Structured(), run_of(module, [IMAGES]))
    assert "test_structured.py line" in refused.value.why
    assert "view(-1, 512)" in refused.value.why
    assert "x.flatten(1)" in refused.value.fix
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_model_without_anything_to_remove_is_refused(run_of: RunOf) -> None:
    for module in (nn.Linear(4, 2), nn.ReLU()):
        with pytest.raises(TechniqueError, match="no channel or head of this model can be removed"):
            apply(module.eval(), Structured(), run_of(module, [torch.randn(3, 4)]))


def test_a_ratio_too_small_for_one_step_is_refused(run_of: RunOf) -> None:
    module = nets.Residual(4).eval()
    with pytest.raises(TechniqueError, match="the target would remove no channel") as refused:
        apply(module, Structured(pruning_ratio=0.01), run_of(module, [IMAGES]))
    assert "conv1, has 8 channels" in refused.value.why


def test_a_goal_in_time_counts_as_the_default_ratio_here(run_of: RunOf) -> None:
    module = nets.Residual(10).eval()
    apply(module, Structured(target_speedup=2.0), run_of(module, [IMAGES]))
    assert module.stem.out_channels == 7
