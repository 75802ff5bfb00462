from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.blocks import LowRankLinear, SpatialConv2d, Tucker2Conv2d
from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.requests.factorize import Factorization, Svd, Whitened

RunOf = Callable[..., Any]
Factorized = Callable[..., Any]
Correlated = Callable[..., Tensor]


class Net(nn.Module):
    """A plain network with a tied pair, whose weights count once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 48, bias=False)
        )
        self.tied, self.again = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)
        self.again.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.tied(self.body(x)))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, padding="valid", bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(32, 48, 1),
        )
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convs(x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def cnn() -> Cnn:
    torch.manual_seed(0)
    return Cnn().eval()


def images() -> Tensor:
    smooth = nn.AvgPool2d(3, 1, 1)
    return smooth(torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(1))) + 0.5


def off(original: nn.Module, changed: nn.Module, x: Tensor) -> float:
    """Relative error of the outputs."""
    with torch.no_grad():
        wanted = original(x)
        return float((changed(x) - wanted).norm() / wanted.norm())


GOALS: list[dict[str, Any]] = [{"rank_ratio": 0.5}, {"rank": 6}, {"energy": 0.8}, {"target_compression": 1.6}]


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_on_the_calibration_data_it_loses_no_more_than_plain_svd(
    goal: dict[str, Any], run_of: RunOf, factorized: Factorized, correlated: Correlated
) -> None:
    """At the same ranks: an energy is that of other things in the two, so there the sizes differ too."""
    module, x = net(), correlated(256, 32)
    run = run_of(module, x=x)
    white, _ = factorized(module, Whitened(**goal), run)
    plain, _ = factorized(module, Svd(**goal), run)
    if "energy" in goal:
        assert count_params(white)[0] < count_params(plain)[0]
    else:
        assert off(module, white, x) < 0.8 * off(module, plain, x)


def test_a_single_layer_loses_exactly_the_cut_off_singular_values(
    run_of: RunOf, factorized: Factorized, correlated: Correlated
) -> None:
    """Oracle: numpy-free torch on the centred inputs; the mean of the outputs is kept by the bias."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 10)).eval()
    x = correlated(200, 12)
    changed, outcome = factorized(module, Whitened(rank=3), run_of(module, input=x))
    with torch.no_grad():
        wanted, given = module(x).double(), changed(x).double()
    torch.testing.assert_close(given.mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(wanted - wanted.mean(0))
    least = values[3:].norm() / values.norm()
    reached = (given - wanted).norm() / (wanted - wanted.mean(0)).norm()
    assert float(reached) >= float(least) * (1 - 1e-4)
    told = float(outcome.changed[0].after.split("output: ")[1].rstrip("%")) / 100
    assert told == pytest.approx(float(reached), abs=1e-3)


def test_an_unbiased_layer_gets_the_product_of_least_error(
    run_of: RunOf, factorized: Factorized, correlated: Correlated
) -> None:
    """The outputs all matter alike here (the identity follows), so the error is that of the best product."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 10, bias=False)).eval()
    x = correlated(4000, 12)
    changed, _ = factorized(module, Whitened(rank=3, calibration_samples=4000), run_of(module, input=x))
    values = torch.linalg.svdvals(module(x).detach().double())
    assert off(module, changed, x) == pytest.approx(float(values[3:].norm() / values.norm()), rel=0.1)


@pytest.mark.parametrize("compression", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("params", [Svd(), Whitened()], ids=lambda params: params.method)
def test_the_whole_model_reaches_its_target_within_two_percent(
    params: Factorization, compression: float, run_of: RunOf, factorized: Factorized, correlated: Correlated
) -> None:
    module = net()
    wanted = params.model_copy(update={"target_compression": compression, "targets": ["body"]})
    if compression == 4.0:  # the tied pair alone is a fifth of the model
        with pytest.raises(TechniqueError, match="cannot be reached"):
            factorized(
                module, wanted.model_copy(update={"target_compression": 5.0}), run_of(module, x=torch.ones(2, 32))
            )
    changed, _ = factorized(module, wanted, run_of(module, x=correlated(128, 32)))
    reached = count_params(module)[0] / count_params(changed)[0]
    assert compression <= reached <= compression * 1.02


@pytest.mark.parametrize(("form", "block"), [("spatial", SpatialConv2d), ("tucker2", Tucker2Conv2d)])
def test_convolutions_become_the_form_that_was_asked_for(
    form: str, block: type[nn.Module], run_of: RunOf, factorized: Factorized
) -> None:
    module, x = cnn(), images()
    run = run_of(module, x=x)
    white, outcome = factorized(module, Whitened(rank_ratio=0.5, convolution=form), run)
    plain, _ = factorized(module, Svd(rank_ratio=0.5, convolution=form), run)
    assert isinstance(white.convs[2], block)
    assert isinstance(white.convs[4], block)
    assert isinstance(white.convs[6], SpatialConv2d)  # a 1x1 convolution is one matrix
    assert off(module, white, x) < off(module, plain, x)
    assert next(change for change in outcome.changed if change.path == "convs.2").before == "32 x 16 x 3 x 3"


def test_the_form_that_loses_less_is_taken_by_itself(run_of: RunOf, factorized: Factorized) -> None:
    """A sum of two products of row and column filters is spatial of rank 2; a product of channel bases is Tucker-2."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    with torch.no_grad():
        module[0].weight.copy_(SpatialConv2d(8, 8, 3, rank=2).dense_weight())
        module[1].weight.copy_(Tucker2Conv2d(8, 8, 3, rank_in=2, rank_out=2).dense_weight())
    _, outcome = factorized(module, Svd(energy=0.9999), run_of(module, input=torch.ones(2, 8, 6, 6)))
    assert [change.after.split(";")[0] for change in outcome.changed] == ["spatial, rank 2", "tucker2, ranks 2 and 2"]


@pytest.mark.parametrize("params", [Whitened(rank_ratio=0.5), Whitened(), Svd()], ids=str)
def test_the_same_run_gives_the_same_bits(params: Factorization, run_of: RunOf, factorized: Factorized) -> None:
    module = cnn()
    run = run_of(module, x=images())
    torch.manual_seed(1)
    first, _ = factorized(module, params, run)
    torch.manual_seed(2)
    second, _ = factorized(module, params, run)
    states = first.state_dict(), second.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_rank_that_makes_a_layer_no_smaller_leaves_it_with_the_numbers(run_of: RunOf, factorized: Factorized) -> None:
    """By hand: 64 x 32 at rank 22 is 22 * 96 = 2,112 of 2,048 weights; 64 x 64 is 2,816 of 4,096."""
    module = net()
    changed, outcome = factorized(module, Svd(rank=22), run_of(module, x=torch.ones(2, 32)))
    reasons = {skip.path: skip.reason for skip in outcome.skipped}
    assert (
        "rank 22 needs 2,112 weights, the dense layer 2,048; the layer shrinks only below rank 21.3"
        in reasons["body.0"]
    )
    assert "shared with another layer" in reasons["tied"]
    assert isinstance(changed.body[2], LowRankLinear)
    assert changed.again.weight is changed.tied.weight


def test_nothing_to_factorize_is_an_error_that_says_why(run_of: RunOf, factorized: Factorized) -> None:
    module = net()
    run = run_of(module, x=torch.ones(2, 32))
    with pytest.raises(TechniqueError, match="no layer can be factorized") as raised:
        factorized(module, Svd(targets=["tied"]), run)
    assert "shared with another layer" in raised.value.why
    relu = nn.Sequential(nn.ReLU())
    with pytest.raises(TechniqueError, match="no layer can be factorized"):
        factorized(relu, Svd(), run_of(relu, input=torch.ones(2, 4)))


def test_inputs_that_are_no_numbers_leave_a_layer_whole(run_of: RunOf, factorized: Factorized) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.hurt = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fine(x) + self.hurt(x / 0.0).nan_to_num(0.0, 0.0, 0.0)

    module = Broken().eval()
    changed, outcome = factorized(module, Whitened(rank=2), run_of(module, x=torch.rand(16, 8)))
    assert [change.path for change in outcome.changed] == ["fine"]
    assert outcome.skipped[0].reason == "its inputs on the calibration samples contain NaN or infinity"
    assert changed.hurt.weight.shape == (8, 8)


def test_later_layers_make_up_for_what_earlier_ones_lost(
    run_of: RunOf, factorized: Factorized, correlated: Correlated
) -> None:
    """Solving each layer on its own, on the original's inputs, loses more."""
    module, x = net(), correlated(256, 32)
    run = run_of(module, x=x)
    together, _ = factorized(module, Whitened(rank_ratio=0.4, targets=["body"]), run)
    apart = copy.deepcopy(module)
    for path in ("body.0", "body.2", "body.4"):
        alone, _ = factorized(module, Whitened(rank_ratio=0.4, targets=[path]), run)
        parent, _, name = path.rpartition(".")
        setattr(apart.get_submodule(parent), name, alone.get_submodule(path))
    assert off(module, together, x) < off(module, apart, x)


def test_the_fused_encoder_of_torch_runs_the_low_rank_layers(run_of: RunOf, factorized: Factorized) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    module = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(8, 5, 16)
    changed, outcome = factorized(module, Whitened(rank_ratio=0.5), run_of(module, src=x))
    assert [change.path for change in outcome.changed] == [f"layers.{i}.linear{n}" for i in (0, 1) for n in (1, 2)]
    called = []
    changed.layers[0].linear1.register_forward_hook(lambda *_: called.append(1))
    padding = torch.tensor([[False] * 3 + [True] * 2] * 8)
    with torch.no_grad():
        plain = changed(x)
        changed(x, src_key_padding_mask=padding)
    assert len(called) == 2
    called.clear()
    changed.train()
    torch.testing.assert_close(changed(x), plain)


def test_a_layer_used_in_two_places_is_replaced_in_both(run_of: RunOf, factorized: Factorized) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    module = nn.Sequential(shared, nn.GELU(), shared).eval()
    changed, outcome = factorized(module, Whitened(rank=3), run_of(module, input=torch.randn(64, 16)))
    assert [change.path for change in outcome.changed] == ["0"]
    assert changed[0] is changed[2]
    assert isinstance(changed[0], LowRankLinear)


def test_a_layer_too_wide_for_its_moment_is_factorized_all_the_same(
    run_of: RunOf, factorized: Factorized, correlated: Correlated, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = net(), correlated(256, 32)
    run = run_of(module, x=x)
    plain, _ = factorized(module, Svd(rank_ratio=0.5), run)
    monkeypatch.setattr("omgoptim.techniques.factorize._low_rank.second_moments.MAX_MOMENT_INPUTS", 40)
    wide, outcome = factorized(module, Whitened(rank_ratio=0.5), run)
    assert len(outcome.changed) == 3
    assert off(module, wide, x) < off(module, plain, x)
