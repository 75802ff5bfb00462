"""Channel groups of networks, and layers that run only for some inputs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import SetupError, TechniqueError
from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._channels.dependency_graph import coverage, covering, find_groups
from omgoptim.techniques.prune._channels.groups import Groups
from omgoptim.techniques.registry import ModuleRun, apply_to_module

RunOf = Callable[..., ModuleRun]
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Switched(nn.Module):
    """A stem that one of two layers reads, by the sign of the input's mean, and a tail that always runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.positive, self.negative = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.wide, self.out = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        h = self.positive(h) if x.mean() > 0 else self.negative(h)
        return self.out(self.wide(h).relu())


def rows(*signs: int) -> Tensor:
    """One row for each sign: all ones, scaled a little apart."""
    return torch.stack([torch.full((4,), sign * (1 + index / 10)) for index, sign in enumerate(signs)])


def switched() -> nn.Module:
    torch.manual_seed(0)
    return Switched().eval()


def test_coverage_counts_for_how_many_samples_each_layer_ran(run_of: Any) -> None:
    model = switched()
    known = coverage(model, run_of(model, [rows(1, 1, -1)]))
    assert (known.samples, known.runs["positive"], known.runs["negative"], known.runs["out"]) == (3, 2, 1, 3)
    assert len(known.execution_paths) == 2
    assert set(known.partial()) == {"positive", "negative"}


def test_a_layer_that_is_called_without_rows_has_not_run(run_of: Any) -> None:
    class Dispatched(Switched):
        def forward(self, x: Tensor) -> Tensor:
            h, positive = self.stem(x).relu(), x.mean(1) > 0
            out = h.new_zeros(len(x), 6)
            for layer, taken in ((self.positive, positive), (self.negative, ~positive)):
                out = out.index_add(0, torch.where(taken)[0], layer(h[taken]))
            return self.out(self.wide(out).relu())

    model = Dispatched().eval()
    known = coverage(model, run_of(model, [rows(1, 1, -1)]))
    assert (known.runs["positive"], known.runs["negative"], known.runs["out"], len(known.execution_paths)) == (
        2,
        1,
        3,
        2,
    )


def test_a_model_without_branches_has_one_way_and_nothing_partial(run_of: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    probe, known = covering(model, run_of(model, [rows(1, -1)]))
    assert (known.partial(), known.execution_paths, probe.further_calls) == ({}, [], ())


def test_layers_of_a_branch_stay_and_the_rest_is_pruned_for_both_ways(run_of: Any) -> None:
    model = switched()
    run = run_of(model, [rows(1, 1, -1, 1)])  # the first two, on which channels are traced, take the same way
    outcome = apply_to_module(model, Structured(pruning_ratio=0.5, reconstruct=False), run)
    assert {change.path for change in outcome.changed} == {"wide", "out"}
    reasons = {skip.path: skip.reason for skip in outcome.skipped}
    assert "runs only for some inputs (3 of 4 samples)" in reasons["stem"]
    assert "runs only for some inputs (1 of 4 samples)" in reasons["negative"]
    for x in (rows(1), rows(-1)):
        assert model(x).shape == (1, 3)


def test_a_layer_that_never_ran_keeps_all_groups_of_its_width_whole(run_of: Any) -> None:
    model = switched()
    groups = find_groups(model, Structured(), run_of(model, [rows(1, 1, 1, 1)]))
    assert [group.name for group in groups.groups] == ["wide"]
    reasons = {skip.path: skip.reason for skip in groups.skipped}
    assert "negative may read or write its channels: it ran for none of 4 samples" in reasons["stem"]
    assert "ran for none" in reasons["negative"]


def test_a_branch_without_layers_that_fixes_the_width_is_proven_against(run_of: Any) -> None:
    class Fixed(nn.Module):
        """Reads its hidden width as a number, through a layer of its own, on one way only."""

        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.scale, self.out = nn.Linear(4, 10), nn.PReLU(1), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.hidden(x)
            if x.mean() < 0:
                h = self.scale(h).view(-1, 5, 2).flatten(1)
            return self.out(h)

    model = Fixed().eval()
    with pytest.raises(TechniqueError, match="no channel or head of this model can be removed") as error:
        apply_to_module(model, Structured(pruning_ratio=0.1, reconstruct=False), run_of(model, [rows(1, 1, -1)]))
    assert "hidden" in error.value.why


def found_in(module: nn.Module, run_of: RunOf, x: Tensor = IMAGES, **asked: object) -> Groups:
    return find_groups(module, Structured(**asked), run_of(module, [x]))  # type: ignore[arg-type]


def reasons(groups: Groups) -> dict[str, str]:
    return {skip.path: skip.reason for skip in groups.skipped}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's, of a layer without weights
def test_layers_without_channels_form_no_group(run_of: RunOf) -> None:
    assert found_in(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)), run_of, torch.randn(3, 4)).groups == []


def test_channels_that_are_added_go_together_and_the_outputs_stay(run_of: RunOf) -> None:
    groups = found_in(nets.Residual(), run_of)
    assert [(group.name, group.width, group.unit) for group in groups.groups] == [("stem", 8, 1), ("conv1", 16, 1)]
    assert set(groups.groups[0].members) == {
        ("stem", "out"),
        ("bn", "out"),
        ("conv1", "in"),
        ("conv2", "out"),
        ("head", "in"),
    }
    assert reasons(groups) == {"head": "its channels are outputs of the model"}


def test_units_follow_from_groups_of_convolutions_and_of_norms(run_of: RunOf) -> None:
    groups = {group.name: group for group in found_in(nets.Branches(), run_of).groups}
    assert {name: (group.width, group.unit, group.exact) for name, group in groups.items()} == {
        "left": (8, 1, True),
        "right": (6, 1, True),
        "joined": (8, 4, True),
        "grouped": (12, 4, True),
        "up": (16, 2, True),
        "narrow": (8, 2, False),
        "hidden": (10, 1, True),
    }
    assert groups["joined"].units().tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]  # one of each group of the convolution
    assert groups["up"].units()[0].tolist() == [0, 1]  # a whole group of the norm
    assert groups["narrow"].units()[0].tolist() == [0, 4]  # of two groups of a norm, one channel each


def test_a_channel_may_be_many_columns_behind_a_flattened_map(run_of: RunOf) -> None:
    narrow = next(group for group in found_in(nets.Branches(), run_of).groups if group.name == "narrow")
    hidden = next(place for place in narrow.places if place.path == "hidden")
    assert len(hidden.positions) == 8 * 16
    assert hidden.positions[hidden.roots == 1].tolist() == list(range(16, 32))


def test_a_depthwise_convolution_is_in_its_neighbours_group(run_of: RunOf) -> None:
    groups = {group.name: group for group in found_in(nets.mobile(), run_of, torch.randn(2, 3, 16, 16)).groups}
    assert list(groups) == ["0", "1.layers.0", "2.layers.0", "2.layers.6"]
    assert ("1.layers.3", "out") in groups["1.layers.0"].members
    assert ("1.layers.6", "out") in groups["0"].members  # added to what the stem gives


def test_the_module_is_as_it_was_and_nothing_is_printed(run_of: RunOf, capsys: pytest.CaptureFixture[str]) -> None:
    class Loud(nets.Residual):
        def forward(self, x: Tensor) -> Tensor:
            print("forward")
            return super().forward(x)

    module = Loud().train()
    run = run_of(module, [IMAGES])
    module.train()
    before = copy.deepcopy(module.state_dict())
    capsys.readouterr()
    find_groups(module, Structured(), run)
    assert capsys.readouterr().out == ""
    assert module.training
    assert module.conv1.out_channels == 16
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_reshape_to_a_number_is_reported_with_its_line_and_other_groups_shrink(run_of: RunOf) -> None:
    groups = found_in(nets.HardCoded(), run_of)
    assert [group.name for group in groups.groups] == ["first"]
    lines = Path(nets.__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "x.view(-1, 512)" in text)
    assert f"pruning_nets.py line {line}: return self.out(x.view(-1, 512))" in reasons(groups)["second"]


def test_a_stream_under_layer_norm_stays(run_of: RunOf) -> None:
    groups = found_in(nets.Vit(24, nets.FusedAttention(24, 4)), run_of, torch.randn(2, 3, 16, 16))
    assert "blocks.0.norm1 (LayerNorm)" in reasons(groups)["patches"]
    assert [group.name for group in groups.groups] == ["blocks.0.attention.qkv", "blocks.0.fc1"]


def test_multihead_attention_stays_and_its_feed_forward_shrinks(run_of: RunOf) -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    groups = found_in(module, run_of, torch.randn(2, 5, 8))
    assert [group.name for group in groups.groups] == ["linear1"]
    assert "MultiheadAttention" in reasons(groups)["self_attn"]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 6)
        self.recurrent = kind(6, 6, batch_first=True)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(self.second(torch.relu(self.first(x))))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_keeps_its_widths(kind: type[nn.LSTM], run_of: RunOf) -> None:
    groups = found_in(Recurrent(kind), run_of, torch.randn(2, 3, 4))
    assert [group.name for group in groups.groups] == ["first"]
    assert "recurrent" in reasons(groups)["recurrent"]
    assert "second" in reasons(groups)


class Tied(nn.Module):
    """Text without a norm: the embedding's width is its stream's, and the output has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.hidden, self.back = nn.Linear(8, 16), nn.Linear(16, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.out(x + self.back(torch.relu(self.hidden(x))))


def test_tied_weights_stay_tied(run_of: RunOf) -> None:
    groups = found_in(Tied(), run_of, torch.randint(20, (2, 5)))
    assert [group.name for group in groups.groups] == ["hidden"]
    assert "tied to" in reasons(groups)["back"]


def test_a_frozen_layer_keeps_its_group_whole_and_does_not_hide_the_others(run_of: RunOf) -> None:
    module = nets.Residual()
    module.conv2.weight.requires_grad_(False)
    groups = found_in(module, run_of)
    assert groups.groups == []
    assert reasons(groups)["conv1"] == "conv2.weight is frozen (requires_grad is False)"
    module.conv2.weight.requires_grad_(True)
    module.stem.weight.requires_grad_(False)
    assert [group.name for group in found_in(module, run_of).groups] == ["conv1"]


def test_a_weight_that_is_computed_from_others_stays(run_of: RunOf) -> None:
    module = nets.Residual()
    nn.utils.parametrizations.weight_norm(module.conv1)
    assert "parametrization" in reasons(found_in(module, run_of))["conv1"]


class Splitting(nn.Module):
    """Half of the channels gate the other half: to torch-pruning two independent halves."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.after, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 2, 1)
        self.register_buffer("scale", torch.ones(1, 12, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, 1)
        return self.out(self.after(value * torch.sigmoid(gate)) * self.scale)


def test_what_cannot_be_proven_is_left_alone(run_of: RunOf) -> None:
    groups = found_in(Splitting(), run_of)
    assert groups.groups == []
    assert set(reasons(groups)) == {"both", "after", "out"}


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).softmax(-1))


def test_channels_that_are_mixed_on_their_way_stay(run_of: RunOf) -> None:
    groups = found_in(Softmax(), run_of, torch.randn(3, 4))
    assert "mixes channels" in reasons(groups)["first"]


class BothEnds(nn.Module):
    """The last states of both directions side by side, as classifiers of sequences have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, states = self.rnn(self.embed(x))
        return self.head(self.hidden(torch.cat([states[-2], states[-1]], 1)).relu())


def test_layers_behind_concatenated_states_of_a_recurrent_layer_shrink(run_of: RunOf) -> None:
    groups = found_in(BothEnds(), run_of, torch.randn(3, 7, 4))
    assert [group.name for group in groups.groups] == ["hidden"]
    assert {skip.path for skip in groups.skipped} == {"embed", "rnn", "head"}


def test_a_prelu_with_one_weight_for_all_channels_stays_as_it_is(run_of: RunOf) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(), nn.Conv2d(8, 4, 3))
    groups = found_in(module, run_of)
    assert [(group.name, [place.path for place in group.places]) for group in groups.groups] == [("0", ["0", "2"])]
    outcome = apply_to_module(module, Structured(pruning_ratio=0.5, reconstruct=False), run_of(module, [IMAGES]))
    assert {change.path for change in outcome.changed} == {"0", "2"}
    assert (module[0].out_channels, module[1].num_parameters, module(IMAGES).shape[1]) == (4, 1, 4)


class StackedExperts(nn.Module):
    """A mixture of experts whose weights are one parameter each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.out = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 16)), nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        each = torch.einsum("beh,ehd->bed", torch.einsum("bd,edh->beh", h, self.up).relu(), self.down)
        return self.out(h + (self.router(h).softmax(-1)[..., None] * each).sum(1))


class Boxes(nn.Module):
    """Decodes its boxes, as YOLO does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 2 * 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.head(self.stem(x).relu())
        batch, _, height, width = raw.shape
        made = raw.view(batch, 2, 7, height, width).permute(0, 1, 3, 4, 2).sigmoid()
        places = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)
        parts = [made[..., :2] * 2 + places, (made[..., 2:4] * 2) ** 2, made[..., 4:]]
        return torch.cat(parts, -1).reshape(batch, -1, 7)


def test_a_walk_that_torch_pruning_would_never_end_keeps_the_layer(run_of: RunOf) -> None:
    groups = found_in(StackedExperts(), run_of, torch.randn(3, 4))
    assert groups.groups == []
    assert "mixes" in reasons(groups)["first"]
    groups = found_in(Boxes(), run_of)
    assert [group.name for group in groups.groups] == ["stem"]
    assert {skip.path for skip in groups.skipped} == {"head"}


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {"logits": self.head(features), "features": features}


def test_a_layer_whose_outputs_are_the_models_too_stays(run_of: RunOf) -> None:
    groups = found_in(TwoOutputs(), run_of, torch.randn(3, 4))
    assert groups.groups == []
    assert reasons(groups)["body"] == "its channels are outputs of the model"


def test_targets_and_ignore_name_layers_or_what_is_around_them(run_of: RunOf) -> None:
    module, x = nets.mobile(), torch.randn(2, 3, 16, 16)
    assert [group.name for group in found_in(module, run_of, x, targets=["2"]).groups] == ["2.layers.0", "2.layers.6"]
    left = found_in(module, run_of, x, ignore=["*.layers.3"])
    assert [group.name for group in left.groups] == ["0", "2.layers.6"]
    assert reasons(left)["1.layers.0"] == "1.layers.3 is excluded by ignore"
    with pytest.raises(TechniqueError, match="'nothing' matches no layer"):
        found_in(module, run_of, x, targets=["nothing"])


def test_a_missing_torch_pruning_is_an_error_with_the_install_line(
    run_of: RunOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(SetupError) as refused:
        found_in(nets.Residual(), run_of)
    assert "pip install torch-pruning" in refused.value.fix
