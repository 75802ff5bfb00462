from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.distill._student.narrowing import find_narrowing, narrow_to
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
ALL = LayerSelection([], [])


def test_a_quarter_of_the_width_is_a_quarter_of_every_group(run_of: RunOf, drawn: Any, resnet: Any) -> None:
    module = resnet(16)
    run = run_of(module, drawn(8, 1, 12, 12))
    narrow_to(module, find_narrowing(module, ALL, run), 0.25, run, fit=False)
    assert count_params(module)[0] == count_params(resnet(4))[0]


def test_widths_are_multiples_of_what_was_asked_for_and_never_above_the_teachers(
    run_of: RunOf, drawn: Any, resnet: Any
) -> None:
    module = resnet(24)
    run = run_of(module, drawn(8, 1, 12, 12))
    narrow_to(module, find_narrowing(module, ALL, run), 0.4, run, fit=False, round_to=16)
    widths = {layer.out_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)}
    assert widths
    assert all(width in (16, 32) for width in widths)


def test_one_channel_stays_everywhere_at_the_smallest_width(run_of: RunOf, drawn: Any, resnet: Any) -> None:
    module = resnet(8)
    run = run_of(module, drawn(8, 1, 12, 12))
    narrow_to(module, find_narrowing(module, ALL, run), 0.01, run, fit=False)
    convs = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert {conv.out_channels for conv in convs} == {1}
    assert module(drawn(2, 1, 12, 12)).shape == (2, 10)


def test_one_narrowing_serves_copies_at_any_width_and_leaves_what_it_was_found_in(
    run_of: RunOf, drawn: Any, resnet: Any
) -> None:
    module = resnet(8)
    run = run_of(module, drawn(8, 1, 12, 12))
    narrowing, before = find_narrowing(module, ALL, run), copy.deepcopy(module.state_dict())
    sizes = []
    for width in (0.75, 0.5, 0.25):
        copied = copy.deepcopy(module)
        narrow_to(copied, narrowing, width, run, fit=True)
        sizes.append(count_params(copied)[0])
    assert sizes == [count_params(resnet(width))[0] for width in (6, 4, 2)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_wide_layers_keep_multiples_of_eight_and_narrow_ones_any_number(run_of: RunOf, drawn: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 30), nn.ReLU(), nn.Linear(30, 2))
    run = run_of(module, drawn(4, 4))
    narrow_to(module, find_narrowing(module, ALL, run), 0.37, run, fit=False)
    assert (module[0].out_features, module[2].out_features) == (72, 11)  # of 74 and 11.1


def test_fitted_on_data_it_is_nearer_to_the_teacher_than_cut(run_of: RunOf, drawn: Any, resnet: Any) -> None:
    teacher, x = resnet(16), drawn(64, 1, 12, 12)
    run = run_of(teacher, x)
    narrowing = find_narrowing(teacher, ALL, run)
    errors = {}
    for fit in (False, True):
        student = copy.deepcopy(teacher)
        narrow_to(student, narrowing, 0.5, run, fit=fit)
        with torch.no_grad():
            errors[fit] = float((student(x) - teacher(x)).norm())
    assert errors[True] < 0.7 * errors[False]


def test_random_inputs_fit_nothing(run_of: RunOf, drawn: Any, resnet: Any) -> None:
    x = drawn(16, 1, 12, 12)
    cut, fitted = resnet(8), resnet(8)
    run = run_of(cut, x, real=False)
    narrowing = find_narrowing(cut, ALL, run)
    for module, fit in ((cut, False), (fitted, True)):
        narrow_to(module, narrowing, 0.5, run, fit=fit)
    assert torch.equal(cut(x), fitted(x))


class Heard(nn.Module):
    def __init__(self, bidirectional: bool = False) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 8, batch_first=True, bidirectional=bidirectional)
        self.hidden = nn.Linear(16 if bidirectional else 8, 10)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.rnn(x)[0][:, -1])))


def test_hidden_units_and_channels_shrink_together_and_their_readers_are_fitted(run_of: RunOf, drawn: Any) -> None:
    torch.manual_seed(0)
    teacher, x = Heard().eval(), drawn(64, 5, 4)
    run = run_of(teacher, x)
    narrowing, errors = find_narrowing(teacher, ALL, run), {}
    for fit in (False, True):
        module = copy.deepcopy(teacher)
        narrow_to(module, narrowing, 0.5, run, fit=fit)
        assert (module.rnn.hidden_size, module.hidden.in_features, module.hidden.out_features) == (4, 4, 5)
        errors[fit] = float((module(x) - teacher(x)).detach().norm())
    assert errors[True] < 0.9 * errors[False]


def test_a_recurrent_layer_of_both_directions_shrinks_with_the_layers_behind_it(run_of: RunOf, drawn: Any) -> None:
    module = Heard(bidirectional=True).eval()
    run = run_of(module, drawn(3, 5, 4))
    outcome = narrow_to(module, find_narrowing(module, ALL, run), 0.25, run, fit=True)
    assert (module.rnn.hidden_size, module.hidden.in_features, module.hidden.out_features) == (2, 4, 3)
    assert [skip.path for skip in outcome.skipped] == ["out"]


def test_heads_go_whole(run_of: RunOf, drawn: Any) -> None:
    torch.manual_seed(0)
    module = nets.Vit(24, nets.FusedAttention(24, 4)).eval()
    run = run_of(module, drawn(4, 3, 16, 16))
    narrow_to(module, find_narrowing(module, ALL, run), 0.4, run, fit=False)
    attention = module.blocks[0].attention
    assert (attention.num_heads, attention.head_dim, attention.qkv.out_features) == (2, 6, 36)


def test_nothing_that_may_change_means_nothing_that_can_shrink(run_of: RunOf, drawn: Any, resnet: Any) -> None:
    module = resnet(4)
    narrowing = find_narrowing(module, LayerSelection([], [], nothing=True), run_of(module, drawn(2, 1, 12, 12)))
    assert not narrowing.is_possible


def test_a_model_that_does_not_run_is_refused(run_of: RunOf, drawn: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    run = run_of(module, drawn(2, 4))
    module[0] = nn.Linear(5, 4)
    with pytest.raises(TechniqueError, match="does not run"):
        find_narrowing(module, ALL, run)
