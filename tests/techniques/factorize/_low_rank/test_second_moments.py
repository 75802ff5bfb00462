from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from omgoptim.techniques.factorize._low_rank import second_moments as moments_module
from omgoptim.techniques.factorize._low_rank.second_moments import InputMoments, input_moments, output_influence
from omgoptim.techniques.reconstruction.inputs import MAX_PATCHES, input_rows, rows_of_shape

RunOf = Callable[..., Any]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.second(self.first(x)) * attention_mask[..., None]


def read(module: nn.Module, run: Any, samples: int = 100) -> dict[str, InputMoments]:
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    return dict(input_moments(module, layers, run, samples))


def test_moments_of_two_rows_by_hand(run_of: RunOf) -> None:
    """Rows (1, 2) and (3, 0): means 2 and 1; squares (1 + 9) / 2, (4 + 0) / 2, product (2 + 0) / 2."""
    module = nn.Sequential(nn.Linear(2, 2)).eval()
    found = read(module, run_of(module, input=torch.tensor([[1.0, 2.0], [3.0, 0.0]])))["0"]
    assert found.rows == 2
    assert found.mean.tolist() == [[2.0, 1.0]]
    assert found.second is not None
    assert found.second.tolist() == [[[5.0, 1.0], [1.0, 2.0]]]


def test_padding_positions_are_left_out(run_of: RunOf) -> None:
    module = Masked().eval()
    x = torch.randn(2, 3, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = read(module, run_of(module, x=x, attention_mask=mask))
    real = x[mask.bool()].double()
    torch.testing.assert_close(found["first"].second, (real.mT @ real / 3)[None])
    assert found["second"].rows == 3


def test_only_the_asked_number_of_samples_is_read(run_of: RunOf) -> None:
    module = nn.Sequential(nn.Linear(2, 2)).eval()
    assert read(module, run_of(module, input=torch.ones(40, 2)), samples=25)["0"].rows == 25


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2),
    ],
)
def test_rows_times_the_weight_give_the_convolutions_output(conv: nn.Conv2d) -> None:
    x = torch.randn(3, 4, 7, 6)
    with pytest.warns(UserWarning, match="even kernel") if conv.kernel_size == (2, 3) else torch.no_grad():
        expected = conv.double()(x.double())
    rows = input_rows(conv, x, None)
    given = rows @ conv.weight.detach().reshape(conv.groups, 6 // conv.groups, -1).mT
    out = given.mT.reshape(6, 3, -1).transpose(0, 1) + conv.bias[:, None]
    torch.testing.assert_close(out.reshape(expected.shape), expected)
    assert rows.shape[1] == rows_of_shape(conv, x.shape)


def test_of_a_large_image_only_some_patches_are_read_and_always_the_same() -> None:
    conv = nn.Conv2d(1, 2, 3)
    x = torch.randn(2, 1, 40, 40)
    rows = input_rows(conv, x, None)
    assert rows.shape == (1, 2 * MAX_PATCHES, 9)
    assert torch.equal(rows, input_rows(conv, x, None))


def test_a_layer_too_wide_for_its_moment_is_read_by_its_outputs(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "MAX_MOMENT_INPUTS", 3)
    module = nn.Sequential(nn.Linear(4, 2)).eval()
    x = torch.randn(20, 4)
    found = read(module, run_of(module, input=x))["0"]
    y = functional.linear(x, module[0].weight.detach()).double()
    assert found.second is None
    torch.testing.assert_close(found.outputs, (y.mT @ y / 20)[None], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_together_is_read_in_turns(run_of: RunOf, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    run = run_of(module, input=torch.randn(20, 4))
    together = read(module, run)
    monkeypatch.setattr(moments_module, "MAX_PASS_BYTES", 1)
    apart = read(module, run)
    assert all(torch.equal(together[path].second, apart[path].second) for path in ("0", "2"))  # type: ignore[arg-type]


def test_influence_of_a_linear_model_by_hand(run_of: RunOf) -> None:
    """z = W y: G is W'W over the square of the output's size, in expectation over the random combinations."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)).eval()
    x = torch.randn(128, 3)
    with torch.no_grad():
        size = module(x).double().square().mean()
    found = output_influence(module, {"0": module[0]}, run_of(module, input=x), 128)["0"][0]
    weight = module[1].weight.detach().double()
    expected = weight.mT @ weight / size
    assert float((found - expected).norm() / expected.norm()) < 0.35


def test_influence_reaches_layers_before_operations_in_place(run_of: RunOf) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)).eval()
    module.requires_grad_(False)
    layers = {"0": module[0], "3": module[3]}
    found = output_influence(module, layers, run_of(module, input=torch.randn(4, 1, 4, 4)), 4)
    assert set(found) == {"0", "3"}
    assert not any(parameter.grad is not None for parameter in module.parameters())


def test_a_model_without_gradients_has_no_influence(run_of: RunOf) -> None:
    class Label(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).argmax(-1)

    module = Label().eval()
    assert output_influence(module, {"head": module.head}, run_of(module, x=torch.randn(4, 3)), 4) == {}
