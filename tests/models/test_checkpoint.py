from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omgoptim.errors import ModelError
from omgoptim.models.checkpoint import load_checkpoint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return Net().state_dict()


def loads(path: Path) -> list[str]:
    """The notes of loading `path` into a new module, which then has exactly these weights."""
    torch.manual_seed(1)
    module = Net()
    notes = load_checkpoint(module, path)
    assert all(torch.equal(value, weights()[name]) for name, value in module.state_dict().items())
    return notes


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt"])
def test_a_state_dict_is_read_as_torch_saves_it(tmp_path: Path, name: str) -> None:
    torch.save(weights(), tmp_path / name)
    assert loads(tmp_path / name) == []


def test_a_safetensors_file_is_read(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "w.safetensors")
    assert loads(tmp_path / "w.safetensors") == []


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights().items()}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: {"state_dict": weights(), "epoch": 3, "optimizer": {"lr": 0.1}}, ["under 'state_dict'"]),
        (lambda: {"model": weights()}, ["under 'model'"]),
        (lambda: {"checkpoint": 1, "model": {"state_dict": weights()}}, ["under 'model'", "under 'state_dict'"]),
        (lambda: prefixed("module."), ["prefix 'module.'"]),
        (lambda: prefixed("_orig_mod."), ["prefix '_orig_mod.'"]),
        (lambda: prefixed("module._orig_mod."), ["prefix 'module.'", "prefix '_orig_mod.'"]),
        (lambda: {"state_dict": prefixed("model.")}, ["under 'state_dict'", "prefix 'model.'"]),
    ],
)
def test_nesting_and_prefixes_are_recognized_with_a_note(
    tmp_path: Path, made: Callable[[], object], said: list[str]
) -> None:
    torch.save(made(), tmp_path / "w.pt")
    notes = loads(tmp_path / "w.pt")
    assert len(notes) == len(said)
    assert all(words in note and note.startswith("checkpoint w.pt: ") for words, note in zip(said, notes, strict=True))


def test_a_model_whose_own_keys_look_like_a_wrapper_keeps_them(tmp_path: Path) -> None:
    module = nn.Sequential()
    module.add_module("module", nn.Linear(3, 2))
    torch.save(module.state_dict(), tmp_path / "w.pt")
    assert load_checkpoint(module, tmp_path / "w.pt") == []


def test_keys_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = weights()
    state["fc.weights"] = state.pop("fc.weight")
    torch.save(state, tmp_path / "w.pt")
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ModelError, match=r"checkpoint w\.pt does not fit") as error:
        load_checkpoint(module, tmp_path / "w.pt")
    assert error.value.why == "missing: fc.weight; unexpected: fc.weights"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_shapes_that_do_not_fit_are_named_and_a_long_list_is_cut(tmp_path: Path) -> None:
    torch.save(weights() | {"fc.weight": torch.zeros(2, 5)}, tmp_path / "w.pt")
    with pytest.raises(ModelError) as error:
        load_checkpoint(Net(), tmp_path / "w.pt")
    assert error.value.why == "unlike the model's: fc.weight has shape (2, 5) in the file and (2, 3) in the model"
    assert "`model_kwargs=" in error.value.fix
    torch.save({f"layer{index}.weight": torch.zeros(1) for index in range(20)}, tmp_path / "w.pt")
    with pytest.raises(ModelError) as error:
        load_checkpoint(Net(), tmp_path / "w.pt")
    assert "and 15 more" in error.value.why


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('the pickle ran')",)


@pytest.mark.parametrize("made", [Net, lambda: {"state_dict": weights(), "config": Evil()}])
def test_a_pickle_of_more_than_tensors_is_refused_without_running_it(
    tmp_path: Path, made: Callable[[], object]
) -> None:
    torch.save(made(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="contains more than tensors") as error:
        load_checkpoint(Net(), tmp_path / "w.pt")
    assert "torch.save(model.state_dict()" in error.value.fix


@pytest.mark.parametrize("zipped", [True, False])
def test_arguments_paths_and_numpy_scores_beside_the_weights_are_passed_over(tmp_path: Path, zipped: bool) -> None:
    beside = {
        "args": argparse.Namespace(rate=0.1, folder=tmp_path),
        "best": np.float64(0.9),
        "history": np.arange(3.0),
        "when": datetime(2026, 1, 1),
    }
    torch.save(
        {"epoch": 3, "state_dict": weights(), **beside}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped
    )
    assert loads(tmp_path / "w.pt") == [
        "checkpoint w.pt: the weights were under 'state_dict'",
        "checkpoint w.pt: ignored, since the model has no such key: history",
    ]


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_are_numpy_arrays_are_read(tmp_path: Path, zipped: bool) -> None:
    arrays = {name: np.array(value.numpy(), order="F") for name, value in weights().items()}
    arrays["fc.bias"] = arrays["fc.bias"].astype(">f8")
    beside = {"classes": np.array(["cat", "dog"]), "extra": np.array([None, 1], dtype=object)}
    torch.save({"state_dict": arrays | beside}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert loads(tmp_path / "w.pt")[1:] == ["checkpoint w.pt: 1 tensors were cast from float64 to the model's float32"]


class Crafted:
    """A pickle of an array whose state numpy did not write."""

    def __init__(self, state: tuple[object, ...]) -> None:
        self.state = state

    def __reduce__(self) -> tuple[object, ...]:
        return *np.arange(2.0).__reduce__()[:2], self.state


@pytest.mark.parametrize(
    "state",
    [
        (1, (2, 3), np.dtype("float32"), False, b"short"),
        (1, (-2, -3), np.dtype("float32"), False, bytes(24)),
        (1, "23", np.dtype("float32"), False, bytes(24)),
        (1, (2, 3), np.dtype("O"), False, [1] * 6),
        (1, (2, 3), "float32", False, bytes(24)),
        (1,),
    ],
)
def test_an_array_with_another_content_than_numpy_writes_fills_nothing(
    tmp_path: Path, state: tuple[object, ...]
) -> None:
    torch.save(weights() | {"fc.weight": Crafted(state)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"missing: fc\.weight"):
        load_checkpoint(Net(), tmp_path / "w.pt")


def test_a_dict_within_itself_is_an_error(tmp_path: Path) -> None:
    state: dict[str, object] = {}
    state["again"] = state
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="nested too deep"):
        load_checkpoint(Net(), tmp_path / "w.pt")


def test_dicts_that_each_name_the_next_one_twice_are_an_error_at_once(tmp_path: Path) -> None:
    state: dict[str, object] = {"w": torch.zeros(2)}
    for _ in range(60):  # 2 ** 60 paths in a file of a few kilobytes
        state = {"a": state, "b": state}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="or too many"):
        load_checkpoint(Net(), tmp_path / "w.pt")


def test_weights_of_a_diverged_training_are_named(tmp_path: Path) -> None:
    torch.save(weights() | {"fc.weight": torch.full((2, 3), float("nan"))}, tmp_path / "w.pt")
    assert load_checkpoint(Net(), tmp_path / "w.pt") == ["checkpoint w.pt: weights contain NaN: fc.weight"]


def test_tensors_without_values_fill_nothing(tmp_path: Path) -> None:
    torch.save({name: tensor.to("meta") for name, tensor in weights().items()}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"missing: fc\.weight"):
        load_checkpoint(Net(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", ["half", "empty", "text", "zeros"])
def test_a_damaged_file_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(weights(), path)
    else:
        save_file(weights(), path)
    whole = path.read_bytes()
    damaged = {"half": whole[: len(whole) // 2], "empty": b"", "text": b"version https://git-lfs", "zeros": bytes(5000)}
    path.write_bytes(damaged[content])
    with pytest.raises(ModelError, match=f"checkpoint {name} cannot be read") as error:
        load_checkpoint(Net(), path)
    assert error.value.why
    assert error.value.fix
    assert "set to `False`" not in error.value.why  # torch's advice, which would run the file's code


def test_other_kinds_of_file_are_named_as_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "w.h5").touch()
    with pytest.raises(ModelError, match="has an unknown format"):
        load_checkpoint(Net(), tmp_path / "w.h5")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="contains a list"):
        load_checkpoint(Net(), tmp_path / "w.pt")


def test_the_same_call_takes_the_averaged_or_the_plain_weights_with_a_note(tmp_path: Path) -> None:
    plain = {name: value + 1 for name, value in weights().items()}
    torch.save({"state_dict": plain, "state_dict_ema": weights()}, tmp_path / "w.pt")
    assert any("averaged weights (EMA) were used" in note for note in loads(tmp_path / "w.pt"))
    module = Net()
    notes = load_checkpoint(module, tmp_path / "w.pt", "plain")
    assert torch.equal(module.fc.weight, plain["fc.weight"])
    assert any("plain weights were used" in note for note in notes)


def test_the_state_of_an_averaged_model_holds_averaged_weights(tmp_path: Path) -> None:
    torch.manual_seed(7)
    torch.save(torch.optim.swa_utils.AveragedModel(Net()).state_dict(), tmp_path / "w.pt")
    net = Net()
    notes = load_checkpoint(net, tmp_path / "w.pt", "ema")
    assert torch.equal(net.fc.weight, weights()["fc.weight"])
    assert "checkpoint w.pt: the weights are averaged (EMA); the file has no others" in notes
    with pytest.raises(ModelError, match="has no plain weights"):
        load_checkpoint(Net(), tmp_path / "w.pt", "plain")
