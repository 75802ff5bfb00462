"""n of every m: torch's own masks, convolutions along their input channels, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.requests.prune import SemiStructured
from omgoptim.techniques.registry import apply_to_module

RunOf = Callable[..., Any]
Drawn = Callable[..., Tensor]


def prune(module: nn.Module, run: Any, **options: Any) -> Any:
    return apply_to_module(module, SemiStructured(**options), replace(run, real=False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_of_four_are_those_that_torchs_sparsifier_keeps(run_of: RunOf, drawn: Drawn) -> None:
    from torch.ao.pruning import WeightNormSparsifier

    ours, theirs = nn.Sequential(nn.Linear(32, 16)), nn.Sequential(nn.Linear(32, 16))
    theirs.load_state_dict(ours.state_dict())
    prune(ours, run_of(ours, [drawn(4, 32)]))
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(ours[0].weight, theirs[0].weight)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("1:2", 1, 2)])
def test_a_convolution_keeps_n_of_m_input_channels_at_each_position(
    run_of: RunOf, drawn: Drawn, pattern: str, n: int, m: int
) -> None:
    conv = nn.Sequential(nn.Conv2d(16, 4, 3, groups=2))
    weight = conv[0].weight.detach().clone()
    outcome = prune(conv, run_of(conv, [drawn(2, 16, 5, 5)]), pattern=pattern)
    for output in range(4):
        for row in range(3):
            for column in range(3):
                for start in range(0, 8, m):
                    now = conv[0].weight[output, start : start + m, row, column]
                    was = weight[output, start : start + m, row, column].abs()
                    assert int((now != 0).sum()) == n
                    assert was[now != 0].min() >= was[now == 0].max()
    zeros = 288 * (m - n) // m
    assert outcome.changed[0].after == f"{100 * (m - n) / m:.1f} % zero ({zeros} of 288)"
    assert outcome.changed[0].what == f"{pattern} by magnitude"


def test_layers_that_m_does_not_divide_are_left_alone_with_their_sizes(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 10))
    outcome = prune(net, run_of(net, [drawn(2, 3, 5, 5)]))
    assert [change.path for change in outcome.changed] == ["1"]
    assert [(skip.path, skip.reason) for skip in outcome.skipped] == [
        ("0", "its 3 inputs are not divisible by 4"),
        ("3", "its 6 inputs are not divisible by 4"),
    ]
    with pytest.raises(TechniqueError, match="no layer has a number of inputs divisible by 16") as error:
        prune(net, run_of(net, [drawn(2, 3, 5, 5)]), pattern="8:16")
    assert error.value.why == "their numbers of inputs: 0: 3, 1: 8, 3: 6"


def test_wanda_keeps_the_weights_of_loud_inputs(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.Sequential(nn.Linear(8, 5))
    x = drawn(16, 8) * torch.tensor([100.0, 1, 1, 100, 1, 100, 100, 1])
    net[0].weight.data.uniform_(0.5, 1.0)
    prune(net, run_of(net, [x]), score="wanda")
    assert (net[0].weight != 0).tolist() == [[True, False, False, True, False, True, True, False]] * 5


def test_recurrent_and_attention_weights_take_the_pattern_too(run_of: RunOf, drawn: Drawn) -> None:
    net = nn.LSTM(8, 4, batch_first=True)
    prune(net, run_of(net, [drawn(2, 3, 8)]))
    for weight in (net.weight_ih_l0, net.weight_hh_l0):
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())


def test_a_pattern_that_holds_already_is_refused_and_more_zeros_than_it_asks_for_stay(
    run_of: RunOf, drawn: Drawn
) -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    net[0].weight.data[0, :3] = 0
    run = run_of(net, [drawn(2, 8)])
    prune(net, run)
    assert (net[0].weight[0, :4] != 0).tolist() == [False, False, False, True]
    with pytest.raises(TechniqueError, match="no weight became zero"):
        prune(net, run)
