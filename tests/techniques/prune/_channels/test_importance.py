"""The oracle is torch-pruning's own importance, of the same group in its own graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pruning_nets as nets
import pytest
import torch
import torch_pruning
from torch import Tensor, nn

from omgoptim.errors import DataError, TechniqueError
from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.importance import importance_of
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def net() -> nets.Residual:
    torch.manual_seed(0)
    module = nets.Residual().eval()
    nn.init.uniform_(module.bn.weight)
    return module


def ours(module: nn.Module, run: ModuleRun, importance: str) -> dict[str, Tensor]:
    params = Structured(importance=importance)  # type: ignore[arg-type]
    return importance_of(module, find_groups(module, params, run), params, run)


def theirs(module: nn.Module, root: str, importance: Any) -> Tensor:
    graph = torch_pruning.DependencyGraph().build_dependency(module, IMAGES[:1])
    layer: Any = module.get_submodule(root)
    everything = list(range(layer.out_channels))
    score: Tensor = importance(graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, everything))
    return score / score.mean()


@pytest.mark.parametrize(
    ("name", "oracle", "root"),
    [
        ("magnitude", torch_pruning.importance.GroupMagnitudeImportance(p=2), "stem"),
        ("magnitude", torch_pruning.importance.GroupMagnitudeImportance(p=2), "conv1"),
        ("fpgm", torch_pruning.importance.FPGMImportance(p=2), "stem"),
        ("bn_scale", torch_pruning.importance.BNScaleImportance(), "stem"),
        ("lamp", torch_pruning.importance.LAMPImportance(p=2), "conv1"),
    ],
)
def test_weights_are_weighed_as_torch_pruning_weighs_them(name: str, oracle: Any, root: str, run_of: RunOf) -> None:
    module = net()
    mine = ours(module, run_of(module, [IMAGES]), name)[root]
    torch.testing.assert_close(mine, theirs(module, root, oracle), rtol=1e-4, atol=1e-5)


def test_taylor_is_what_torch_pruning_makes_of_the_same_gradients(run_of: RunOf) -> None:
    module = net()
    run = run_of(module, [IMAGES])
    mine = ours(module, run, "taylor")["conv1"]
    assert all(tensor.grad is None for tensor in module.parameters())
    run.loss(module(IMAGES), None).backward()
    oracle = torch_pruning.importance.GroupTaylorImportance(multivariable=True)
    torch.testing.assert_close(mine, theirs(module, "conv1", oracle), rtol=1e-4, atol=1e-5)


def test_hessian_squares_the_gradients_of_single_samples(run_of: RunOf) -> None:
    module = net()
    run = run_of(module, [IMAGES[:2], IMAGES[2:]])
    mine = ours(module, run, "hessian")["conv1"]
    oracle = torch_pruning.importance.GroupHessianImportance()
    for image in IMAGES:
        module.zero_grad()
        run.loss(module(image[None]), None).backward()
        for tensor in module.parameters():  # accumulate_grad of torch-pruning 1.6.1 keeps the last sample only
            oracle._accu_grad[tensor] = oracle._accu_grad.get(tensor, 0) + tensor.grad.square()
            oracle._counter[tensor] = 1
    torch.testing.assert_close(mine, theirs(module, "conv1", oracle), rtol=1e-4, atol=1e-5)


def test_labels_reach_the_loss(run_of: RunOf) -> None:
    module, seen = net(), []

    def loss(outputs: Tensor, target: Any) -> Tensor:
        seen.append(target)
        return nn.functional.cross_entropy(outputs, torch.as_tensor(target))

    labels = torch.tensor([0, 1, 2, 3]).numpy()
    assert torch.isfinite(ours(module, run_of(module, [IMAGES], [labels], loss), "taylor")["stem"]).all()
    ours(module, run_of(module, [IMAGES], [labels], loss), "hessian")
    assert [len(target) for target in seen] == [4, 1, 1, 1, 1]


def test_random_numbers_come_from_the_seed(run_of: RunOf) -> None:
    module = net()
    same = [ours(module, run_of(module, [IMAGES], seed=seed), "random")["stem"] for seed in (3, 3, 4)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_a_group_without_a_norm_is_judged_by_its_weights(run_of: RunOf) -> None:
    module = net()
    run = run_of(module, [IMAGES])
    assert torch.equal(ours(module, run, "bn_scale")["conv1"], ours(module, run, "magnitude")["conv1"])


def test_channels_of_a_unit_have_the_mean_of_the_unit(run_of: RunOf) -> None:
    module = nets.Branches().eval()
    params = Structured()
    run = run_of(module, [IMAGES])
    groups = find_groups(module, params, run)
    scores = importance_of(module, groups, params, run)
    for group in groups.groups:
        of_units = scores[group.name][group.units()]
        assert torch.equal(of_units, of_units[:, :1].expand_as(of_units))
        assert scores[group.name].mean() == pytest.approx(1.0, abs=1e-5)


def test_a_loss_without_a_gradient_or_with_one_that_is_not_a_number_is_an_error(run_of: RunOf) -> None:
    module = net()
    with pytest.raises(TechniqueError, match="no gradient"):
        ours(module, run_of(module, [IMAGES], loss=lambda outputs, _: outputs.detach().sum()), "taylor")
    with pytest.raises(DataError, match="cannot be computed"):
        ours(module, run_of(module, [IMAGES], loss=lambda outputs, _: (outputs - outputs).sqrt().sum()), "taylor")
