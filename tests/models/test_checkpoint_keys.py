"""Keys as other tools write them, matched with a model's."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import ModelError
from omgoptim.models.checkpoint import match_keys


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


STATE = net().state_dict()


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_averaged_model_loads_and_its_counter_is_named() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(net()).state_dict()
    found = match_keys(averaged, net(1).state_dict())
    assert same(found.state)
    assert found.notes == [
        "the prefix 'module.' was dropped",
        "the weights are averaged (EMA); the file has no others",
        "ignored, since the model has no such key: n_averaged",
    ]


def test_a_loss_beside_the_model_is_left_out_and_named_but_not_what_belongs_to_the_optimizer() -> None:
    loaded = {
        "state_dict": prefixed("net.") | {"criterion.weight": torch.ones(2)},
        "optimizer_states": {"state": {0: {"exp_avg": torch.ones(2)}}},
    }
    found = match_keys(loaded, net(1).state_dict())
    assert same(found.state)
    assert found.notes[-1].endswith("no such key: state_dict.criterion.weight")


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module"])
def test_a_wrapper_in_the_middle_of_a_key_is_dropped(wrapper: str) -> None:
    loaded = {name.replace("0.", f"0.{wrapper}.", 1) if name.startswith("0.") else name: STATE[name] for name in STATE}
    found = match_keys(loaded, net(1).state_dict())
    assert same(found.state)
    assert found.notes == [f"'{wrapper}.' was dropped inside 2 keys"]


def test_a_file_without_the_prefix_that_all_of_the_models_keys_have_fits_too() -> None:
    wrapper = nn.ModuleDict({"backbone": net(1)})
    assert same(match_keys(STATE, wrapper.state_dict()).state, prefixed("backbone."))


def test_two_sets_that_fit_are_never_guessed_between_unless_they_are_equal() -> None:
    other = net(1).state_dict()
    with pytest.raises(ModelError, match="several sets of weights") as error:
        match_keys(prefixed("student.") | prefixed("teacher.", other), STATE)
    assert "'student', 'teacher'" in error.value.why
    assert same(match_keys(prefixed("first.") | prefixed("second."), other).state)


def test_two_different_tensors_for_one_entry_are_refused_by_their_names() -> None:
    with pytest.raises(ModelError, match=r"several tensors for '0\.weight'") as error:
        match_keys(STATE | {"module.0.weight": torch.zeros(4, 3)}, net(1).state_dict())
    assert "module.0.weight" in error.value.why


def test_the_averaged_set_is_noted_and_a_missing_set_is_an_error() -> None:
    own = net(1).state_dict()
    assert any(
        "weights are averaged (EMA); the file has no others" in note for note in match_keys({"ema": STATE}, own).notes
    )
    with pytest.raises(ModelError, match="no plain weights"):
        match_keys({"ema": {"shadow": STATE}}, own, "plain")
    with pytest.raises(ModelError, match=r"no averaged \(EMA\) weights"):
        match_keys({"model": STATE}, own, "ema")
    inside = prefixed("model.") | prefixed("ema_model.", own)
    assert same(match_keys({"state_dict": inside}, own, "plain").state)
    assert same(match_keys({"state_dict": inside}, own, "ema").state, own)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_the_weights_of_lightnings_averaging_callback_are_told_apart_by_its_own_keys(prefix: str) -> None:
    own = net(1).state_dict()
    loaded = {
        "state_dict": prefixed(prefix),
        "current_model_state": prefixed(prefix, own),
        "averaging_state": {"n_averaged": torch.tensor(7)},
    }
    assert same(match_keys(loaded, own, "auto").state)
    assert same(match_keys(loaded, own, "plain").state, own)
    with pytest.raises(ModelError, match="several sets"):  # nothing says which of them is averaged
        match_keys(loaded | {"averaging_state": {}}, own)


def test_norms_without_a_counter_keep_the_models_with_a_note() -> None:
    loaded = {name: value for name, value in STATE.items() if "num_batches" not in name}
    found = match_keys(loaded, net(1).state_dict())
    assert same(found.state)
    assert "lacks num_batches_tracked of 1 norm" in found.notes[0]


def test_weight_normalization_is_read_in_both_spellings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older one is deprecated
        old = nn.utils.weight_norm(nn.Linear(3, 4))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    to_new = match_keys(old.state_dict(), new.state_dict()).state
    assert torch.equal(to_new["parametrizations.weight.original0"], old.weight_g)
    assert torch.equal(to_new["parametrizations.weight.original1"], old.weight_v)
    to_old = match_keys(new.state_dict(), old.state_dict())
    assert torch.equal(to_old.state["weight_g"], new.parametrizations.weight.original0)
    assert any("this model's names" in note for note in to_old.notes)


def test_gamma_and_beta_are_a_norms_scale_and_shift() -> None:
    norm = nn.LayerNorm(3)
    gamma, beta = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    found = match_keys({"gamma": gamma, "beta": beta}, norm.state_dict()).state
    assert torch.equal(found["weight"], gamma)
    assert torch.equal(found["bias"], beta)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("stored", ["embedding.weight", "head.weight"])
def test_a_tied_weight_that_is_stored_once_fills_both_its_names(stored: str) -> None:
    weight = torch.arange(15.0).reshape(5, 3)
    found = match_keys({stored: weight}, Tied().state_dict())
    assert all(torch.equal(value, weight) for value in found.state.values())
    assert len(found.state) == 2
    assert "tied to" in found.notes[0]


def test_a_file_that_unties_a_tied_weight_is_refused() -> None:
    with pytest.raises(ModelError, match="tied in the model differ"):
        match_keys({"embedding.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}, Tied().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_cast_with_a_note(dtype: torch.dtype) -> None:
    loaded = {name: value.to(dtype) if value.is_floating_point() else value for name, value in STATE.items()}
    found = match_keys(loaded, net(1).state_dict())
    assert found.notes == [f"8 tensors were cast from {str(dtype).removeprefix('torch.')} to the model's float32"]
    model = net(1)
    model.load_state_dict(found.state)
    assert torch.equal(model[0].weight, STATE["0.weight"].to(dtype).float())


def test_weights_of_a_layer_that_the_model_lacks_are_another_architecture() -> None:
    deeper = STATE | {"3.weight": torch.ones(2, 2), "3.bias": torch.ones(2)}
    with pytest.raises(ModelError, match="does not fit") as error:
        match_keys(deeper, net(1).state_dict())
    assert error.value.why == "unexpected: 3.weight, 3.bias"


def test_integers_are_no_floating_weights() -> None:
    quantized = {name: value.to(torch.int8) if name == "0.weight" else value for name, value in STATE.items()}
    with pytest.raises(ModelError) as error:
        match_keys(quantized, net(1).state_dict())
    assert "0.weight is int8 in the file and float32 in the model" in error.value.why
