from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import flop_registry

from omgoptim.measure import macs as counting
from omgoptim.measure.macs import batch_of, count_macs
from omgoptim.measure.self_time import ROOT


def macs(module, *args, **kwargs):
    return count_macs(module, args, kwargs).macs


def reasons(count):
    return {entry.path: entry.reason for entry in count.check.disagreements}


class Functional(nn.Module):
    """Attention and matrix products without modules."""

    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_costs_inputs_times_outputs_for_every_row(bias):
    assert macs(nn.Linear(4, 5, bias=bias), torch.randn(1, 3, 4)) == 3 * 4 * 5


def test_a_grouped_strided_convolution_costs_its_kernel_at_every_output_position():
    # 9x9 -> 4x4 positions, 6 filters, each over 4 / 2 channels of 3x3
    assert macs(nn.Conv2d(4, 6, 3, stride=2, groups=2), torch.randn(1, 4, 9, 9)) == 4 * 4 * 6 * 2 * 9


def test_a_depthwise_and_a_one_dimensional_convolution_count_like_any_other():
    assert macs(nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(1, 8, 5, 5)) == 5 * 5 * 8 * 9
    assert macs(nn.Conv1d(3, 4, 5), torch.randn(1, 3, 10)) == 6 * 4 * 3 * 5


def test_a_transposed_convolution_costs_its_kernel_at_every_input_position_and_thop_disagrees():
    count = count_macs(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (torch.randn(1, 4, 5, 5),), {})
    assert count.macs == 5 * 5 * 4 * 3 * 9
    assert count.check.thop == 11 * 11 * 6 * 2 * 9
    assert "per input position" in reasons(count)[ROOT]


def test_a_two_layer_bidirectional_lstm_costs_every_weight_once_a_step():
    lstm = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True)
    count = count_macs(lstm, (torch.randn(1, 3, 4),), {})
    first, second = 4 * 5 * (4 + 5), 4 * 5 * (10 + 5)  # four gates; the second layer reads both directions
    assert count.macs == 3 * 2 * (first + second) == 2880
    assert count.by_path == {ROOT: 2880}


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_a_recurrent_layer_costs_the_same_whichever_kernel_runs_it(kind, gates):
    layer = kind(4, 5, batch_first=True)
    expected = 3 * gates * 5 * (4 + 5)
    assert macs(layer, torch.randn(1, 3, 4)) == expected
    assert counting.recurrent_macs(layer, torch.randn(3, 4)) == expected  # a sequence without a batch
    assert macs(layer.double(), torch.randn(1, 3, 4).double()) == expected  # no oneDNN kernel for this dtype


def test_an_lstm_with_projection_costs_the_projection_too():
    lstm = nn.LSTM(4, 5, num_layers=2, proj_size=3, batch_first=True)
    first, second = 4 * 5 * (4 + 3) + 5 * 3, 4 * 5 * (3 + 3) + 5 * 3
    assert macs(lstm, torch.randn(1, 3, 4)) == 3 * (first + second)


def test_padding_that_packing_removed_is_not_counted():
    lstm = nn.LSTM(4, 5, batch_first=True)
    packed = pack_padded_sequence(torch.randn(2, 7, 4), torch.tensor([7, 2]), batch_first=True)
    assert counting.recurrent_macs(lstm, packed) == (7 + 2) * 4 * 5 * (4 + 5)


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_a_recurrent_cell_costs_one_step_and_thop_adds_the_gates(kind, gates):
    count = count_macs(kind(4, 5), (torch.randn(1, 4),), {})
    assert count.macs == gates * 5 * (4 + 5)
    assert count.check.thop > count.macs
    assert "gates" in reasons(count)[ROOT]


def test_functional_attention_is_counted_and_thop_does_not_see_it():
    count = count_macs(Functional(), (torch.randn(1, 2, 7, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 4)), {})
    assert count.macs == 2 * 7 * 9 * 8 + 2 * 7 * 9 * 4
    assert count.check.thop == 0
    assert "functional" in reasons(count)[ROOT]


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_costs_its_four_projections_and_two_products(need_weights):
    x = torch.randn(1, 7, 16)
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    assert macs(layer, x, x, x, need_weights=need_weights) == 4 * 7 * 16 * 16 + 2 * 7 * 7 * 16


def test_a_transformer_is_counted_layer_by_layer_though_torch_would_fuse_it():
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True)
    count = count_macs(nn.TransformerEncoder(layer, 2), (torch.randn(1, 7, 16),), {})
    attention, linear = 4 * 7 * 16 * 16 + 2 * 7 * 7 * 16, 7 * 16 * 32
    assert count.macs == count.check.dispatcher == 2 * (attention + 2 * linear)
    assert count.by_path["layers.1.self_attn"] == attention
    assert count.by_path["layers.1.linear2"] == linear
    assert "functional" in reasons(count)["layers.0.self_attn"]
    assert "normalization" in reasons(count)["layers.0.norm1"]
    assert "layers.0.linear1" not in reasons(count)


def test_matrix_times_vector_is_counted():
    class Scores(nn.Module):
        def forward(self, x, query):
            return x @ query

    assert macs(Scores(), torch.randn(1, 6, 4), torch.randn(4)) == 6 * 4


def test_matrix_times_vector_that_is_added_to_another_is_counted():
    class Added(nn.Module):
        def forward(self, x, added, query):
            return torch.addmv(added, x[0], query)

    assert macs(Added(), torch.randn(1, 6, 4), torch.randn(6), torch.randn(4)) == 6 * 4


def test_counts_are_for_one_sample_whatever_the_batch():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    one, five = (count_macs(net, (torch.randn(batch, 3, 8, 8),), {}) for batch in (1, 5))
    assert one == five
    assert one.macs == 36 * 4 * 27 + 4 * 36 * 2


def test_the_batch_is_the_first_dimension_of_the_first_input_that_has_one():
    assert batch_of((torch.tensor(3.0), torch.zeros(6, 2)), {}) == 6
    assert batch_of((), {"ids": torch.zeros(4, 2)}) == 4
    assert batch_of((), {}) == 1


def test_the_counts_by_path_leave_out_children_and_add_up():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x):
            return self.body(x) @ x.transpose(1, 2)

    count = count_macs(Net(), (torch.randn(1, 3, 4),), {})
    assert count.by_path == {ROOT: 3 * 4 * 3, "body": 0, "body.0": 96, "body.1": 0, "body.2": 96}
    assert sum(count.by_path.values()) == count.macs


def test_a_module_that_is_used_twice_counts_twice_under_its_first_path():
    shared = nn.Linear(4, 4)
    count = count_macs(nn.Sequential(shared, nn.ReLU(), shared), (torch.randn(1, 4),), {})
    assert count.by_path["0"] == count.macs == 32
    assert count.check.thop == 32
    assert count.check.disagreements == []


def test_inputs_by_name_reach_both_counters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(input=x)

    count = count_macs(Net(), (), {"x": torch.randn(1, 4)})
    assert (count.macs, count.check.thop, count.check.dispatcher) == (20, 20, 20)


def test_a_convolutional_network_differs_from_thop_only_by_what_is_no_matrix_product():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    )
    count = count_macs(net, (torch.randn(1, 3, 8, 8),), {})
    assert list(reasons(count)) == ["1", "3"]  # the larger difference first
    assert count.check.thop - count.check.dispatcher == sum(d.thop for d in count.check.disagreements)
    assert all("no matrix product" in reason for reason in reasons(count).values())


def test_an_exported_program_is_counted_though_it_refuses_eval():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    x = torch.randn(2, 1, 6, 6)
    program = torch.export.export(net, (x,)).module()
    assert macs(program, x) == macs(net, x) == 16 * 2 * 9 + 96


def test_counting_leaves_the_model_exactly_as_it_was():
    class Counting(nn.Sequential):
        """Changes its own state when it is called, and its input."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x.add_(1))

    net = Counting(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(2), nn.LSTM(16, 4)).train()
    net[1].eval()
    net[0].register_forward_hook(lambda *_: None)
    x = torch.zeros(1, 1, 6, 6)
    state = copy.deepcopy(net.state_dict())
    modes = [part.training for part in net.modules()]
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in net.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    formulas = dict(flop_registry)

    assert count_macs(net, (x,), {}).macs == 16 * 2 * 9 + 2 * 4 * 4 * (16 + 4)

    assert net.calls == 0
    assert torch.equal(x, torch.zeros(1, 1, 6, 6))
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    assert [part.training for part in net.modules()] == modes
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in net.modules()] == hooks
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert flop_registry == formulas
    assert torch.is_grad_enabled()


def test_a_counter_that_cannot_take_the_model_gives_none_and_the_other_still_counts(caplog):
    taken = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    taken[0].total_ops = 0  # in the way of the buffer that thop's rules add to
    count = count_macs(taken, (torch.randn(1, 4),), {})
    assert (count.macs, count.check.thop, count.check.dispatcher) == (50, None, 50)
    assert count.check.disagreements == []
    assert "thop cannot count this model" in caplog.text


def test_a_model_that_cannot_run_is_counted_by_neither():
    count = count_macs(nn.Linear(4, 5), (torch.randn(1, 3),), {})
    assert (count.macs, count.check.thop, count.check.dispatcher, count.by_path) == (None, None, None, {})


def test_what_a_model_or_thop_prints_does_not_reach_stdout():
    code = """
import torch
from torch import nn
from omgoptim.measure.macs import count_macs
class Loud(nn.Linear):
    def forward(self, x):
        print("LOUD")
        return super().forward(x)
count_macs(nn.Sequential(Loud(2, 2), nn.Linear(2, 2)), (torch.randn(1, 2),), {})
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "LOUD" in done.stderr
