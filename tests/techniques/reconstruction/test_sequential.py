"""Layer-by-layer fits against a plain reference that runs the whole model again for every layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from omgoptim.models.samples import Samples
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.reconstruction.inputs import StopForward, forward_hooks, padding_mask, run_until_stopped
from omgoptim.techniques.reconstruction.least_squares import ridge
from omgoptim.techniques.reconstruction.sequential import LayerFit, fit_in_order
from omgoptim.techniques.registry import ModuleRun

FIT = LayerFit(lambda _layer, gram, cross: ridge(gram, cross, 1e-6), 10_000, 10)


class Counted(nn.Module):
    """Linear layers with ReLU between, that counts how often each of them runs."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(depth))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.calls += 1
            x = torch.relu(layer(x))
        return x


@pytest.fixture
def run_of(tmp_path) -> Callable[[nn.Module, Tensor], ModuleRun]:  # type: ignore[no-untyped-def]
    def make(module: nn.Module, x: Tensor) -> ModuleRun:
        signature = Signature((InputTensor("x", "float32", tuple(x.shape), False),), "tensor")
        samples = Samples([{"x": x.numpy()}], [None])
        return ModuleRun(signature, samples, lambda _outputs, _target: torch.zeros(()), module, tmp_path)

    return make


def changed(depth: int) -> tuple[Counted, Counted, Tensor]:
    torch.manual_seed(0)
    before = Counted(depth).eval()
    module = copy.deepcopy(before)
    with torch.no_grad():
        for layer in module.layers:
            layer.weight[:, 3:] = 0.0
    return before, module, torch.randn(300, 5)


def plain(before: Counted, module: Counted, x: Tensor) -> None:
    """The reference: for each layer both models from the start, and one least squares of the whole weight."""
    for index, layer in enumerate(module.layers):
        with torch.no_grad():
            wanted, read = x, x
            for old in before.layers[:index]:
                wanted = torch.relu(old(wanted))
            wanted = before.layers[index](wanted)
            for new in module.layers[:index]:
                read = torch.relu(new(read))
            rows = torch.cat([read, torch.ones(len(x), 1)], 1).double()
            solution = torch.linalg.lstsq(rows, wanted.double(), driver="gelsd").solution.float()
            layer.weight.copy_(solution[:5].T)  # type: ignore[operator]
            layer.bias.copy_(solution[5])  # type: ignore[operator]


def test_one_forward_gives_what_a_forward_for_each_layer_gives(
    run_of: Callable[[nn.Module, Tensor], ModuleRun],
) -> None:
    before, module, x = changed(4)
    reference = copy.deepcopy(module)
    paths = [f"layers.{index}" for index in range(4)]
    assert fit_in_order(module, before, dict.fromkeys(paths), run_of(module, x), FIT) == paths
    plain(before, reference, x)
    torch.testing.assert_close(module(x), reference(x), rtol=1e-3, atol=1e-3)


def test_the_number_of_layer_calls_grows_linearly_with_depth(
    run_of: Callable[[nn.Module, Tensor], ModuleRun],
) -> None:
    calls = []
    for depth in (4, 8, 16):
        before, module, x = changed(depth)
        paths = [f"layers.{index}" for index in range(depth)]
        fit_in_order(module, before, dict.fromkeys(paths), run_of(module, x), FIT)
        calls.append(before.calls + module.calls)
    assert calls[1] == 2 * calls[0]
    assert calls[2] == 4 * calls[0]


class Experts(nn.Module):
    """Each sample goes to one of two experts, by its first value; a layer before and a table of constants beside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(5, 5), nn.Linear(5, 5)
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out = torch.zeros_like(y) + self.table(torch.eye(5)[:3]).sum(0)
        for index, expert in enumerate(self.experts):
            rows = torch.where((x[:, 0] > 0) == bool(index))[0]
            out = out.index_add(0, rows, expert(y[rows]))
        return out


@pytest.mark.parametrize("positive", [1, 2])
def test_layers_whose_rows_depend_on_values_are_left_out(
    run_of: Callable[[nn.Module, Tensor], ModuleRun], positive: int
) -> None:
    torch.manual_seed(0)
    before = Experts().eval()
    module = copy.deepcopy(before)
    x = torch.randn(301, 5)
    x[:2, 0] = torch.tensor([1.0, 1.0 if positive == 2 else -1.0])  # with two an expert gets no sample of the probe
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight[:, 3:] = 0.0
    outputs = dict.fromkeys(("first", "table", "experts.0", "experts.1"))
    assert fit_in_order(module, before, outputs, run_of(module, x), FIT) == ["first", "table"]


def test_a_model_that_swallows_exceptions_does_not_swallow_the_end() -> None:
    class MixedPrecision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.first(x)
            except Exception:  # noqa: BLE001 - what a user may write
                x = torch.zeros_like(x)
            given: Tensor = self.second(x)
            return given

    module, seen = MixedPrecision(), []

    def stop(*_: object) -> None:
        raise StopForward

    with forward_hooks(module, {"first": stop, "second": lambda *_: seen.append("second")}):
        run_until_stopped(module, (torch.ones(1, 2),), {})
    assert seen == []
    assert not module.first._forward_hooks


def test_only_masks_that_mark_real_positions_are_padding_masks() -> None:
    mask = torch.tensor([[1, 1, 0]])
    assert padding_mask({"attention_mask": mask}).tolist() == [[True, True, False]]  # type: ignore[union-attr]
    assert padding_mask({"mask": mask.bool()}).tolist() == [[True, True, False]]  # type: ignore[union-attr]
    assert padding_mask({"key_padding_mask": mask.bool()}) is None
    assert padding_mask({"attention_mask": torch.ones(1, 3)}) is None
    assert padding_mask({"attention_mask": torch.tensor([[0.0, -1e9, 0.0]])}) is None
