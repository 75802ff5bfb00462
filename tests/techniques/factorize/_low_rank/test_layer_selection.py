from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from omgoptim.blocks import LowRankLinear
from omgoptim.errors import TechniqueError
from omgoptim.requests.factorize import Factorization, Svd
from omgoptim.techniques.factorize._low_rank.layer_selection import factorizable, shared_inputs
from omgoptim.techniques.probe import layer_calls

RunOf = Callable[..., Any]


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Odd(nn.Module):
    """One of each kind of layer that has to stay, and one that may go."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.good = nn.Linear(8, 8)
        self.own = OwnLinear(8, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda _module, _args, output: output)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.low = LowRankLinear(8, 8, 2)
        self.unused = nn.Linear(8, 8)
        self.one = nn.Linear(8, 1)
        self.empty = nn.Linear(8, 0)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.twin = nn.Linear(8, 8)
        self.other_twin = nn.Linear(8, 8, bias=False)
        self.other_twin.weight = self.twin.weight
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        x = x + self.attention(x, x, x)[0]
        for part in (self.good, self.own, self.normed, self.hooked, self.low, self.frozen, self.twin, self.other_twin):
            x = part(x)
        x = self.rnn(x)[0]
        return self.head(x) + self.one(x) + self.empty(x).sum()


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.round = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(8, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.round(self.depthwise(self.grouped(self.good(x)))))


def found(module: nn.Module, run: Any, **params: Any) -> tuple[list[str], dict[str, str]]:
    paths, skipped = factorizable(module, Svd(**params), run)
    return paths, {skip.path: skip.reason for skip in skipped}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's, of a layer without weights
def test_each_kind_of_layer_that_stays_has_its_reason(run_of: RunOf) -> None:
    module = Odd().eval()
    paths, reasons = found(module, run_of(module, x=torch.ones(2, 5, dtype=torch.int64)))
    assert paths == ["good"]
    expected = {
        "words": "table lookup",
        "attention": "packed projection",
        "attention.out_proj": "reads its weight directly",
        "own": "OwnLinear overrides forward",
        "normed": "computed from other parameters",
        "hooked": "it has hooks",
        "rnn": "recurrent",
        "low": "already low-rank",
        "unused": "never calls it",
        "one": "already has rank 1",
        "empty": "already has rank 1",
        "frozen": "frozen",
        "twin": "shared with another layer: twin.weight, other_twin.weight",
        "other_twin": "shared with another layer",
        "head": "shared with another layer: words.weight, head.weight",
    }
    assert set(reasons) == set(expected)
    assert [path for path, words in expected.items() if words not in reasons[path]] == []


def test_convolutions_without_an_exact_form_stay(run_of: RunOf) -> None:
    module = Convs().eval()
    run = run_of(module, x=torch.ones(2, 4, 6, 6))
    paths, reasons = found(module, run)
    assert paths == ["good", "grouped"]
    assert {path: reason.split(" ")[0] for path, reason in reasons.items()} == {
        "depthwise": "it",
        "round": "padding_mode",
        "up": "only",
    }
    with_reasons = found(module, run, convolution="skip")
    assert with_reasons[0] == []
    assert with_reasons[1]["good"] == "convolutions are excluded (convolution=skip)"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's, of a layer without weights
def test_a_frozen_layer_goes_if_it_is_named_or_if_all_are_frozen(run_of: RunOf) -> None:
    module = Odd().eval()
    run = run_of(module, x=torch.ones(2, 5, dtype=torch.int64))
    assert found(module, run, targets=["frozen"])[0] == ["frozen"]
    assert found(module.requires_grad_(False), run)[0] == ["good", "frozen"]


def test_globs_choose_layers_by_their_path_or_a_module_around_them(run_of: RunOf) -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)).eval()
    run = run_of(module, input=torch.ones(2, 4))
    assert found(module, run, targets=["0"])[0] == ["0.0", "0.1"]
    assert found(module, run, targets=["0"], ignore=["0.1"])[0] == ["0.0"]
    assert found(module, run, ignore=["0"])[1] == dict.fromkeys(["0.0", "0.1"], "excluded by targets or ignore")
    with pytest.raises(TechniqueError, match=r"'0\.2' matches no layer"):
        factorizable(module, Factorization(targets=["0.2"]), run)


def test_the_model_itself_is_no_layer_to_replace(run_of: RunOf) -> None:
    module = nn.Linear(4, 4).eval()
    assert found(module, run_of(module, input=torch.ones(2, 4))) == (
        [],
        {"(model)": "the model itself is this one layer"},
    )


def test_layers_that_see_the_same_rows_are_known(run_of: RunOf) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.q(x)) * self.k(x).sum()

    module = Split().eval()
    layers = {"q": module.q, "k": module.k, "out": module.out}
    uses = layer_calls(module, layers, run_of(module, x=torch.ones(2, 4)))
    assert shared_inputs(layers, uses) == {"q": "q", "k": "q", "out": "out"}
    assert uses["k"].shapes == ((2, 4),)
