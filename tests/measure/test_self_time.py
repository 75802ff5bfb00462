"""Self time of modules, and the slowest layers of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omgoptim.measure.self_time import ROOT, costliest_layers, evaluation_mode, self_cost


class Ticking(nn.Module):
    """Adds to a shared counter before, between and after its children."""

    def __init__(self, counter, ticks, *children):
        super().__init__()
        self.counter, self.ticks = counter, ticks
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        self.counter[0] += self.ticks
        for part in self.parts:
            x = part(x)
        return x


def test_each_module_is_charged_what_it_did_itself():
    counter = [0]
    inner = Ticking(counter, 5)
    net = Ticking(counter, 1, Ticking(counter, 10, inner), inner)
    with self_cost(net, lambda: counter[0]) as costs:
        net(torch.zeros(1))
        net(torch.zeros(1))
    assert costs == {ROOT: 2, "parts.0": 20, "parts.0.parts.0": 20}


def test_a_module_that_raises_inside_another_does_not_upset_the_rest():
    class Failing(Ticking):
        def forward(self, x):
            super().forward(x)
            raise ValueError("no")

    class Careful(Ticking):
        def forward(self, x):
            self.counter[0] += self.ticks
            with pytest.raises(ValueError, match="no"):
                self.parts[0](x)
            return self.parts[1](x)

    counter = [0]
    net = Careful(counter, 1, Failing(counter, 10), Ticking(counter, 100))
    with self_cost(net, lambda: counter[0]) as costs:
        net(torch.zeros(1))
    assert costs == {ROOT: 1, "parts.0": 10, "parts.1": 100}


def test_evaluating_puts_every_mode_back_even_after_an_error():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    net[1].eval()
    with evaluation_mode(net):
        assert not any(part.training for part in net.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(ValueError, match="2D or 3D"), evaluation_mode(net):
        net(torch.zeros(2))
    assert [part.training for part in net.modules()] == [True, True, False]
    assert torch.is_grad_enabled()


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on a busy machine wait for each other for a time slice, in a layer of 40 microseconds as in any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def uneven():
    """One layer has a thousand times the work of any other, and a million times that of the first."""
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2000), nn.Linear(2000, 2000), nn.Linear(2000, 2))


def test_the_layer_with_nearly_all_the_work_comes_first(uneven):
    layers = costliest_layers(uneven, (torch.randn(64, 2),), {}, {"2": 4_000_000}, seconds=0.05)
    assert layers[0].path == "2"
    assert layers[0].kind == "Linear"
    assert layers[0].macs == 4_000_000
    assert layers[0].size_bytes == 4 * (2000 * 2000 + 2000)
    assert layers[0].time_share > 0.5


def test_times_are_sorted_and_shares_of_all_modules_add_up_to_one(uneven):
    layers = costliest_layers(uneven, (torch.randn(1, 2),), {}, {}, top=100, seconds=0.01)
    assert {layer.path for layer in layers} == {ROOT, "0", "1", "2", "3"}
    assert sorted(layers, key=lambda layer: -layer.time_ms) == layers
    assert sum(layer.time_share for layer in layers) == pytest.approx(1)
    assert all(layer.macs is None for layer in layers)


def test_no_more_layers_than_asked_for_are_given(uneven):
    assert len(costliest_layers(uneven, (torch.randn(1, 2),), {}, {}, top=2, seconds=0.01)) == 2


def test_work_in_a_modules_own_forward_is_its_own_and_not_its_parents():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.small = nn.Linear(2, 2)

        def forward(self, x):
            self.small(x)
            big = torch.ones(800, 800)
            return big @ big @ big

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.products = Products()

        def forward(self, *, x):
            return self.products(x)

    layers = costliest_layers(Net(), (), {"x": torch.randn(1, 2)}, {}, seconds=0.05)
    assert layers[0].path == "products"
    assert layers[0].size_bytes == 0
    assert {layer.path for layer in layers} == {"products", "products.small", ROOT}


def test_a_layer_that_is_called_many_times_has_the_time_of_all_its_calls():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.once = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.once(x)
            for _ in range(200):
                x = self.often(x)
            return x

    by_path = {layer.path: layer for layer in costliest_layers(Loop(), (torch.randn(1, 64),), {}, {}, seconds=0.05)}
    assert by_path["often"].time_ms > by_path["once"].time_ms


@pytest.mark.parametrize(
    "module",
    [nn.LSTM(4, 5, batch_first=True), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)],
    ids=["lstm", "transformer"],
)
def test_recurrent_and_attention_layers_are_timed(module):
    layers = costliest_layers(module, (torch.randn(1, 3, 4),), {}, {}, seconds=0.01)
    assert {type(module).__name__, "MultiheadAttention"} & {layer.kind for layer in layers}
    assert all(layer.time_ms > 0 for layer in layers)


def test_the_model_is_as_it_was_afterwards():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    costliest_layers(net, (torch.randn(1, 2),), {}, {}, seconds=0.01)
    assert all(part.training for part in net.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_the_hooks_are_gone_even_if_the_model_raises():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        costliest_layers(net, (torch.randn(1, 3),), {}, {}, seconds=0.01)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_what_the_model_prints_stays_off_stdout(capsys):
    class Loud(nn.Linear):
        def forward(self, x):
            print("LOUD")
            return super().forward(x)

    costliest_layers(Loud(2, 2), (torch.randn(1, 2),), {}, {}, seconds=0.01)
    assert capsys.readouterr().out == ""
