from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from omgoptim.errors import DataError, RequestError, UserCodeError
from omgoptim.models.data import from_callable, open_data, random_data
from omgoptim.models.raw_batch import RawBatch, batch_size, slice_samples, split_target, take_samples
from omgoptim.models.security.path_policy import PathPolicy

X, Y = torch.arange(30.0).reshape(10, 3), torch.arange(10)


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return {"x": X[index], "mask": torch.ones(3), "labels": Y[index]}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


def read(loaded: Any, batch: int = 4) -> list[RawBatch]:
    return list(from_callable(lambda split: loaded, batch, 60).batches("eval"))


def together(batches: list[RawBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([b.inputs for b in batches]), torch.cat([torch.as_tensor(b.target) for b in batches])


@pytest.mark.parametrize(
    ("loaded", "sizes"),
    [
        (TensorDataset(X, Y), [4, 4, 2]),
        (Stream(), [4, 4, 2]),
        (DataLoader(TensorDataset(X, Y), batch_size=5), [5, 5]),
        ([(X[:7], Y[:7]), (X[7:], Y[7:])], [7, 3]),
        (iter([(X, Y)]), [10]),
        ([(X.numpy(), Y.tolist())], [10]),
    ],
    ids=["dataset", "iterable dataset", "loader", "list of batches", "iterator", "arrays"],
)
def test_every_form_of_labelled_data_gives_the_same_samples_in_order(loaded: Any, sizes: list[int]) -> None:
    batches = read(loaded)
    assert [batch_size(b.inputs) for b in batches] == sizes
    x = torch.cat([torch.as_tensor(b.inputs) for b in batches])
    assert torch.equal(x, X)
    assert torch.cat([torch.as_tensor(b.target) for b in batches]).tolist() == Y.tolist()


def test_dict_batches_lose_their_labels_and_keep_everything_else() -> None:
    first = read(Pairs())[0]
    assert list(first.inputs) == ["x", "mask"]
    assert torch.equal(first.target, Y[:4])
    assert split_target({"x": X}).target is None


def test_several_inputs_are_all_but_the_last_element() -> None:
    assert split_target((X, Y)).target is Y
    three = split_target([X, X + 1, Y])
    assert [len(part) for part in three.inputs] == [10, 10]
    assert three.target is Y
    nested = read(TensorDataset(X))[0]
    assert nested.target is None
    assert torch.equal(nested.inputs, X[:4])
    assert split_target(([X, X], Y)).inputs == (X, X)
    assert split_target(X) == RawBatch(X, None)


@pytest.mark.parametrize(
    ("loaded", "kind"),
    [
        (None, "NoneType"),
        (3, "int"),
        ("path/to/data", "str"),
        ({"x": X}, "dict"),
        (X, "Tensor"),
        (X.numpy(), "ndarray"),
        ((X, Y), "tuple of tensors"),
    ],
)
def test_what_holds_no_batches_is_refused_with_what_to_return(loaded: Any, kind: str) -> None:
    with pytest.raises(DataError, match=f"(?m)returned a {kind}$") as error:
        read(loaded)
    assert "[(inputs, target)]" in error.value.fix


def test_a_callable_of_one_argument_gets_the_split_by_place_whatever_its_name() -> None:
    asked = []

    def load(which: str, /, shuffle: bool = False) -> list[Any]:
        asked.append(which)
        return [(X, Y)]

    assert list(from_callable(load, 4, 60).batches("eval"))
    assert asked == ["eval"]


def test_a_callable_that_takes_no_split_is_refused() -> None:
    with pytest.raises(DataError, match="has no argument 'split'") as error:
        from_callable(lambda name, path: [], 4, 60)
    assert error.value.why == "its arguments are (name, path)"
    with pytest.raises(DataError, match="has no argument 'split'"):
        from_callable(list, 4, 60)
    with pytest.raises(DataError, match="the data is a list"):
        from_callable([X], 4, 60)  # type: ignore[arg-type]
    assert list(from_callable(lambda **options: [(X, Y)], 4, 60).batches("train"))


def test_data_that_fails_while_it_is_read_is_the_users_error(capfd: pytest.CaptureFixture[str]) -> None:
    def broken(split: str) -> Iterator[Any]:
        yield X, Y
        raise OSError(f"the {split} disk is gone")

    class Broken:
        def __iter__(self) -> Iterator[Any]:
            raise ValueError("no index")

    with pytest.raises(UserCodeError, match="reading the calibration data") as error:
        list(from_callable(broken, 4, 60).batches("calibration"))
    assert "the calibration disk is gone" in error.value.why
    with pytest.raises(UserCodeError, match="iterating over the eval data"):
        read(Broken())
    assert capfd.readouterr().err.count("Traceback") == 2


def test_data_that_hangs_is_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    def endless() -> Iterator[Any]:
        while True:
            pass
        yield X

    with pytest.raises(UserCodeError, match=r"did not return within 0\.2 s"):
        list(from_callable(lambda split: endless(), 4, 0.2).batches("eval"))


def test_a_callable_of_the_project_gets_each_split_by_name(
    write: Callable[[str, str], Path], policy: PathPolicy
) -> None:
    write("load.py", "import torch\ndef load(split):\n    return [(torch.full((2, 3), float(len(split))), [0, 1])]\n")
    source = open_data("load.py:load", policy, 4, 60, 0)
    assert source.real
    assert [float(next(source.batches(split)).inputs[0, 0]) for split in ("train", "calibration", "eval")] == [
        5.0,
        11.0,
        4.0,
    ]


def test_arrays_with_splits_are_read_by_their_suffix(project: Path, policy: PathPolicy) -> None:
    np.savez(project / "d.npz", x_train=X, y_train=Y, x_eval=X[:3], y_eval=Y[:3])
    source = open_data("d.npz", policy, 4, 60, 0)
    x, y = together(list(source.batches("eval")))
    assert torch.equal(x, X[:3])
    assert torch.equal(y, Y[:3])
    for split in ("train", "calibration"):  # calibration falls back to train, never to eval
        assert torch.equal(together(list(source.batches(split)))[0], X)
    assert source.notes == []


def test_without_a_training_split_nothing_calibrates_on_the_evaluation(project: Path, policy: PathPolicy) -> None:
    np.savez(project / "d.npz", x_eval=X)
    source = open_data("d.npz", policy, 4, 60, 0)
    assert list(source.batches("calibration")) == []


def test_arrays_without_splits_are_divided_once_with_a_note(project: Path, policy: PathPolicy) -> None:
    np.savez(project / "d.npz", x=X, y=Y)
    source = open_data("d.npz", policy, 4, 60, 0)
    calibration, evaluation = (together(list(source.batches(split)))[1] for split in ("calibration", "eval"))
    assert sorted([*calibration.tolist(), *evaluation.tolist()]) == Y.tolist()
    assert "calibration uses 2 of 10 samples" in source.notes[0]
    assert torch.equal(calibration, together(list(open_data("d.npz", policy, 4, 60, 0).batches("calibration")))[1])


def test_several_arrays_are_inputs_by_name_and_half_precision_can_be_read(project: Path, policy: PathPolicy) -> None:
    save_file({"a_eval": X.bfloat16(), "b_eval": X + 1, "labels_eval": Y}, project / "d.safetensors")
    (batch,) = open_data("d.safetensors", policy, 16, 60, 0).batches("eval")
    assert set(batch.inputs) == {"a", "b"}
    assert torch.equal(batch.inputs["a"], X)
    assert batch.target.tolist() == Y.tolist()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "contains no array"),
        ({"x": X, "y": Y[:4]}, "different lengths"),
        ({"x_eval": X, "y_eval": Y[:4]}, "split eval"),
        ({"x": np.float32(3)}, "different lengths"),
        ({"x_train": X}, "none that ends in _eval"),
        ({"x": np.array([{}, 1], dtype=object)}, "Python objects"),
    ],
)
def test_arrays_that_cannot_be_samples_are_refused(
    project: Path, policy: PathPolicy, arrays: dict[str, Any], said: str
) -> None:
    np.savez(project / "d.npz", **arrays)
    with pytest.raises(DataError, match=said):
        open_data("d.npz", policy, 4, 60, 0)


@pytest.mark.parametrize("name", ["d.npz", "d.safetensors"])
def test_a_damaged_or_missing_data_file_is_an_error_about_the_data(
    project: Path, policy: PathPolicy, name: str
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_data(name, policy, 4, 60, 0)
    path = project / name
    if path.suffix == ".npz":
        np.savez(path, x=X)
    else:
        save_file({"x": X}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"data {name} cannot be read"):
        open_data(name, policy, 4, 60, 0)


def test_data_outside_the_project_is_refused(project: Path, policy: PathPolicy) -> None:
    np.savez(project.parent / "d.npz", x=X)
    with pytest.raises(RequestError, match="outside"):
        open_data("../d.npz", policy, 4, 60, 0)


def test_random_token_ids_stay_below_the_smallest_table_and_masks_are_ones() -> None:
    module = nn.ModuleDict({"word": nn.Embedding(6, 2), "position": nn.Embedding(50, 2)})
    specs = ["input_ids:int64:1x40", "attention_mask:int64:1x40", "bias_mask:float32:1x4", "token_type_ids:int64:1x40"]
    source = random_data(specs, module, 3, seed=0)
    batches = list(source.batches("eval"))
    assert not source.real
    assert "random" in source.notes[0]
    assert [batch_size(b.inputs) for b in batches] == [8, 8, 8]
    ids = torch.cat([b.inputs["input_ids"] for b in batches])
    assert set(ids.unique().tolist()) == set(range(6))
    for name, dtype in (("attention_mask", torch.int64), ("bias_mask", torch.float32)):
        assert torch.equal(batches[0].inputs[name], torch.ones_like(batches[0].inputs[name], dtype=dtype))
    assert set(batches[0].inputs["token_type_ids"].unique().tolist()) == {0, 1}


def test_random_inputs_repeat_with_their_seed_and_differ_between_splits() -> None:
    def first(seed: int, split: Any) -> torch.Tensor:
        (x,) = next(random_data(["1x3"], None, 1, seed).batches(split)).inputs
        return x

    assert torch.equal(first(0, "eval"), first(0, "eval"))
    assert not torch.equal(first(0, "eval"), first(1, "eval"))
    assert not torch.equal(first(0, "eval"), first(0, "calibration"))


def test_unnamed_random_inputs_go_by_position_in_their_dtype() -> None:
    x, flag = next(random_data(["float16:1x3", "bool:1x2"], None, 1, 0).batches("eval")).inputs
    assert (x.dtype, x.shape, flag.dtype, flag.shape) == (torch.float16, (8, 3), torch.bool, (8, 2))


def test_taking_samples_cuts_the_last_batch_and_leaves_empty_ones_out() -> None:
    batches = [RawBatch(X[:0], Y[:0]), RawBatch({"x": X[:6]}, Y[:6]), RawBatch({"x": X[6:]}, None)]
    taken = take_samples(batches, 8)
    assert [batch_size(b.inputs) for b in taken] == [6, 2]
    assert torch.equal(taken[1].inputs["x"], X[6:8])
    assert taken[1].target is None
    assert take_samples(batches, 100)[-1] is batches[-1]


def test_taking_stops_reading_when_it_has_enough() -> None:
    def endless() -> Iterator[RawBatch]:
        while True:
            yield RawBatch(X, Y)

    assert len(take_samples(endless(), 25)) == 3


def test_a_batch_without_a_tensor_has_no_size() -> None:
    for inputs, said in (({}, "has no inputs"), ("text", "is a str"), ({"x": [1, 2]}, "is a int")):
        with pytest.raises(DataError, match=said):
            batch_size(inputs)
    assert batch_size(({"x": X},)) == 10
    assert [part.tolist() for part in slice_samples((Y, Y), 1, 3)] == [[1, 2], [1, 2]]
