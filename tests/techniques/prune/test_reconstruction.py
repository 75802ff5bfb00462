"""Reconstruction after channel removal and after masking against exact solutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune import _reconstruction
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.removal import remove_with_positions
from omgoptim.techniques.prune._reconstruction import reconstruct_kept_weights
from omgoptim.techniques.reconstruction import inputs, sequential
from omgoptim.techniques.registry import ModuleRun, Outcome

RunOf = Callable[..., ModuleRun]

Drawn = Callable[..., Tensor]


def cut_and_fit(module: nn.Module, run: ModuleRun, keep: dict[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """The smaller module before fitting, and the paths that were fitted."""
    before = copy.deepcopy(module)
    _, left = remove_with_positions(module, find_groups(module, Structured(), run), keep, run)
    cut = copy.deepcopy(module)
    return cut, _reconstruction.reconstruct_channels(module, before, left, run)


class Twins(nn.Module):
    """A hidden layer (or map) whose second half is the first half, times -3, plus 1."""

    def __init__(self, hidden: nn.Module, reader: nn.Module) -> None:
        super().__init__()
        self.hidden, self.reader = hidden, reader
        with torch.no_grad():
            half = len(hidden.weight) // 2  # type: ignore[arg-type]
            hidden.weight[half:] = hidden.weight[:half] * -3  # type: ignore[index, operator]
            hidden.bias[half:] = hidden.bias[:half] * -3 + 1  # type: ignore[index, operator]

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.reader(self.hidden(x))
        return read.flatten(1)


TWINS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: Twins(nn.Linear(4, 6), nn.Linear(6, 3)), (64, 4)),
    (lambda: Twins(nn.Linear(4, 6), nn.Linear(6, 3)), (16, 5, 4)),
    (lambda: Twins(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, stride=2, dilation=2)), (8, 3, 12, 12)),
    (lambda: Twins(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 3)), (8, 3, 20)),
]


@pytest.mark.parametrize(("build", "shape"), TWINS)
def test_what_the_other_channels_know_is_brought_back(
    build: Callable[[], nn.Module], shape: tuple[int, ...], run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reconstruction, "CHANNEL_DAMPING", 1e-7)
    torch.manual_seed(0)
    module, x = build().eval(), torch.randn(shape)
    expected = module(x)
    width = len(module.hidden.weight)  # type: ignore[arg-type]
    cut, fitted = cut_and_fit(module, run_of(module, [x]), {"hidden": torch.arange(width // 2)})
    assert fitted == ["reader"]
    assert not torch.allclose(cut(x), expected, atol=0.1)
    torch.testing.assert_close(module(x), expected, rtol=1e-2, atol=1e-3)


def test_it_is_the_least_squares_solution(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reconstruction, "CHANNEL_DAMPING", 1e-9)
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(200, 4)
    with torch.no_grad():
        wanted, read = module(x), module[:2](x)[:, :5]
    cut_and_fit(module, run_of(module, [x]), {"0": torch.arange(5)})
    rows = torch.cat([read, torch.ones(200, 1)], 1).double()
    oracle = torch.linalg.lstsq(rows, wanted.double()).solution.float()
    torch.testing.assert_close(module[2].weight, oracle[:5].T, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
    torch.testing.assert_close(module[2].bias, oracle[5], rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]


def test_a_grouped_convolution_is_fitted_group_by_group(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reconstruction, "CHANNEL_DAMPING", 1e-7)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1, groups=2), nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        for first in (0, 4):  # in each group, two channels and their doubles
            module[0].weight[first + 2 : first + 4] = 2 * module[0].weight[first : first + 2]  # type: ignore[index, operator]
            module[0].bias[first + 2 : first + 4] = 2 * module[0].bias[first : first + 2]  # type: ignore[index, operator]
    x = torch.randn(8, 3, 6, 6)
    expected = module(x)
    _, fitted = cut_and_fit(module, run_of(module, [x]), {"0": torch.tensor([0, 1, 4, 5])})
    assert fitted == ["1"]
    torch.testing.assert_close(module(x), expected, rtol=1e-2, atol=1e-3)


def test_layers_are_fitted_in_the_order_in_which_they_run_and_portions_change_nothing(
    run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, x = nets.Residual().eval(), torch.randn(16, 3, 8, 8)
    run, keep = run_of(module, [x[:10], x[10:]]), {"stem": torch.arange(5), "conv1": torch.arange(9)}
    expected, once, twice = module(x), copy.deepcopy(module), copy.deepcopy(module)
    cut, fitted = cut_and_fit(once, run, keep)
    assert fitted == ["conv1", "conv2", "head"]
    monkeypatch.setattr(sequential, "MAX_TARGET_VALUES", 1)  # each layer in forwards of its own
    cut_and_fit(twice, run, keep)
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())
    assert (once(x) - expected).square().mean() < 0.2 * (cut(x) - expected).square().mean()


def test_padding_does_not_change_the_fit(run_of: RunOf) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, values: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(torch.relu(self.first(values))) + 0 * attention_mask[..., None]

    torch.manual_seed(0)
    module, values = Text().eval(), torch.randn(8, 6, 3)
    mask = torch.ones(8, 6, dtype=torch.long)
    mask[:, 4:] = 0
    fitted = []
    for padding in (0.0, 50.0):
        twin, batch = copy.deepcopy(module), values.clone()
        batch[:, 4:] = padding
        run = run_of(twin, [{"values": batch, "attention_mask": mask}])
        cut_and_fit(twin, run, {"first": torch.arange(4)})
        fitted.append(twin.out.weight)
    assert torch.equal(fitted[0], fitted[1])


class Again(nn.Module):
    """One layer that runs twice, between two that run once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.out(torch.relu(self.twice(torch.relu(self.twice(x)))))


def test_what_runs_twice_has_no_one_target(run_of: RunOf) -> None:
    module = Again().eval()
    run = run_of(module, [torch.randn(20, 4)])
    keep = {group.name: torch.arange(4) for group in find_groups(module, Structured(), run).groups}
    assert list(keep) == ["first"]  # of which the layer in between is a part
    assert cut_and_fit(module, run, keep)[1] == ["out"]


def test_what_reads_too_much_is_left_as_it_is(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reconstruction, "MAX_FEATURES", 3)
    module = nets.Residual().eval()
    run = run_of(module, [torch.randn(4, 3, 8, 8)])
    assert cut_and_fit(module, run, {"stem": torch.arange(4)})[1] == []


def test_infinite_activations_change_nothing(run_of: RunOf) -> None:
    module = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    run = run_of(module, [torch.randn(8, 2)])
    broken = replace(run.statistics, batches=[*run.statistics.batches, {"input": np.full((8, 2), 1e30, np.float32)}])
    cut, fitted = cut_and_fit(module, replace(run, statistics=broken), {"0": torch.arange(3)})
    assert fitted == []
    assert torch.equal(module[2].weight, cut[2].weight)  # type: ignore[arg-type, index]


def test_batches_of_other_lengths_are_cut_to_the_one_in_the_middle() -> None:
    batches = [
        {"ids": np.full((2, length), length), "mask": np.ones((2, length), np.int64)} for length in (3, 9, 5, 7, 5)
    ]
    one = inputs.join_batches(batches, 7)
    assert one["ids"].shape == one["mask"].shape == (7, 5)
    assert one["ids"][:, 0].tolist() == [9, 9, 5, 5, 7, 7, 5]


def zeroed(module: nn.Module, fraction: float, seed: int = 0) -> nn.Module:
    """A copy with some weights of each layer zero."""
    sparse = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sparse.parameters():
        if parameter.ndim > 1:
            parameter.data[torch.rand(parameter.shape, generator=generator) < fraction] = 0.0
    return sparse


def net_of(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    if kind == "conv1d":
        last = nn.Conv1d(16, 4, 3, groups=2, bias=False)
        return nn.Sequential(nn.Conv1d(3, 16, 3, padding="same"), nn.ReLU(), last)
    first = nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular")
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 4, (3, 1), stride=2, dilation=2))


@pytest.mark.parametrize(("kind", "shape"), [("linear", (64, 12)), ("conv1d", (32, 3, 20)), ("conv2d", (16, 3, 9, 8))])
def test_outputs_come_nearer_to_what_they_were_and_zeros_stay_zeros(
    run_of: RunOf, drawn: Drawn, kind: str, shape: tuple[int, ...]
) -> None:
    net = net_of(kind)
    batches = [drawn(*shape, seed=seed) for seed in range(4)]
    for axis in range(1, len(shape)):  # neighbours are alike, as in real inputs
        batches = [batch.cumsum(axis) / 3 for batch in batches]
    sparse = zeroed(net, 0.5)
    fitted = copy.deepcopy(sparse)
    assert reconstruct_kept_weights(fitted, net, ["2", "0"], run_of(fitted, batches[:3])) == ["0", "2"]
    with torch.no_grad():
        wanted = net(batches[3])
        assert (fitted(batches[3]) - wanted).norm() < 0.5 * (sparse(batches[3]) - wanted).norm()
    for index in (0, 2):
        assert torch.equal(fitted[index].weight == 0, sparse[index].weight == 0)


def test_a_redundant_input_stands_in_for_its_twin_exactly(run_of: RunOf, drawn: Drawn) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 1))
    sparse = copy.deepcopy(net)
    sparse[0].weight.data[0, 1] = 0.0
    x = drawn(500, 1).expand(500, 2)  # both inputs are the same
    reconstruct_kept_weights(sparse, net, ["0"], run_of(sparse, [x.contiguous()]))
    assert sparse[0].weight[0, 0].item() == pytest.approx(net[0].weight.sum().item(), abs=0.02)
    assert sparse[0].weight[0, 1].item() == 0.0


def test_only_layers_that_run_once_own_their_weight_and_are_of_a_known_kind_are_fitted(
    run_of: RunOf, drawn: Drawn
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.tied, self.other, self.rnn = nn.Linear(4, 4), nn.Linear(4, 4), nn.GRU(4, 4)
            self.other.weight = self.tied.weight

        def forward(self, x: Tensor) -> Tensor:
            given: Tensor = self.rnn(self.other(self.tied(self.twice(self.twice(self.once(x))))))[0]
            return given

    net = Net()
    sparse = zeroed(net, 0.5)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    paths = ["once", "twice", "never", "tied", "rnn.weight_ih_l0"]
    assert reconstruct_kept_weights(sparse, net, paths, run_of(sparse, [drawn(8, 4)])) == ["once"]
    changed = {name for name, value in sparse.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"once.weight", "once.bias"}


def test_frozen_biases_the_model_before_and_modes_stay(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    sparse = zeroed(net, 0.5)
    sparse[0].bias.requires_grad = False
    bias, dense = sparse[0].bias.clone(), copy.deepcopy(net.state_dict())
    run = run_of(sparse, [drawn(16, 6)])
    sparse.train()
    reconstruct_kept_weights(sparse, net, ["0"], run)
    assert torch.equal(sparse[0].bias, bias)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in dense.items())
    assert sparse[1].training
    assert not sparse[0]._forward_hooks


def test_inputs_that_are_no_numbers_change_nothing(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    sparse = zeroed(net, 0.5)
    before = sparse[0].weight.detach().clone()
    run = run_of(sparse, [drawn(16, 6)])
    run.statistics.batches[0]["input"][0, 0] = float("nan")
    reconstruct_kept_weights(sparse, net, ["0"], run)
    assert torch.equal(sparse[0].weight, before)


def test_without_real_data_nothing_is_fitted_or_noted(run_of: RunOf, drawn: Drawn) -> None:
    from omgoptim.requests.prune import Magnitude

    net = nn.Sequential(nn.Linear(6, 4))
    sparse = zeroed(net, 0.5)
    run = replace(run_of(sparse, [drawn(16, 6)]), real=False)
    outcome = Outcome([])
    assert _reconstruction.reconstructed(outcome, sparse, net, Magnitude(), run) is outcome


def test_a_layer_whose_branch_is_not_taken_keeps_its_weights(run_of: RunOf, drawn: Drawn) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bright, self.dark = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.bright(x) if x.mean() > 0 else self.dark(x)
            return out

    net = Branches()
    sparse = copy.deepcopy(net)
    with torch.no_grad():
        sparse.bright.weight[:, 0], sparse.dark.weight[:, 0] = 0, 0
    before = sparse.dark.weight.detach().clone()
    batches = [drawn(8, 4).abs(), drawn(8, 4).abs()]
    assert reconstruct_kept_weights(sparse, net, ["bright", "dark"], run_of(sparse, batches)) == ["bright"]
    assert torch.equal(sparse.dark.weight, before)
