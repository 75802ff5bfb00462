"""Packing of tensors with many zeros: the bits that come back, and the bytes that are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omgoptim.errors import ArtifactError
from omgoptim.models.weights_file import dense_bytes, pack, unpack

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def sparse(shape: tuple[int, ...], kept: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return (values * (torch.rand(shape, generator=generator) < kept)).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1000,), (37, 41), (6, 5, 3, 3), (8, 1, 200)], ids=str)
def test_what_was_packed_comes_back_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = sparse(shape, 0.1, dtype)
    stored, shapes = pack({"w": tensor})
    assert set(stored) == {"w.mask", "w.values"}
    assert shapes == {"w": list(shape)}
    back = unpack(stored, shapes)
    assert set(back) == {"w"}
    assert (back["w"].dtype, back["w"].shape) == (dtype, tensor.shape)
    assert torch.equal(bits(back["w"]), bits(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_zero_nan_infinity_and_the_smallest_number_are_stored_and_only_plus_zero_is_not(
    dtype: torch.dtype,
) -> None:
    tensor = torch.zeros(4096, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal one
    tensor[:5] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), tiny], dtype=dtype)
    stored, shapes = pack({"w": tensor})
    assert stored["w.values"].shape == (5,)
    assert torch.equal(bits(unpack(stored, shapes)["w"]), bits(tensor))


def test_the_mask_has_one_bit_per_element_the_first_in_the_highest() -> None:
    tensor = torch.zeros(1024)
    tensor[[0, 9, 1023]] = torch.tensor([1.0, 2.0, 3.0])
    stored, _ = pack({"w": tensor})
    mask = torch.zeros(128, dtype=torch.uint8)
    mask[[0, 1, 127]] = torch.tensor([0b10000000, 0b01000000, 0b00000001], dtype=torch.uint8)
    assert torch.equal(stored["w.mask"], mask)
    assert stored["w.values"].tolist() == [1.0, 2.0, 3.0]


def test_nine_tenths_zeros_take_a_tenth_of_the_numbers_and_a_bit_each() -> None:
    tensor = torch.zeros(80_000)
    tensor[::10] = 1.0
    stored, _ = pack({"w": tensor})
    assert dense_bytes(stored) == 8_000 * 4 + 10_000
    assert dense_bytes({"w": tensor}) == 320_000


def test_what_would_not_get_smaller_is_left_as_it_is() -> None:
    tensors = {
        "dense": torch.ones(1000),
        "small": torch.zeros(30),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(0.0),
        "ids": torch.zeros(1000, dtype=torch.int64),
        "flags": torch.zeros(1000, dtype=torch.bool),
        "barely": sparse((1000,), 0.985),
    }
    stored, shapes = pack(tensors)
    assert shapes == {}
    assert all(stored[name] is tensor for name, tensor in tensors.items())
    assert unpack(stored, shapes) == stored


def test_a_tensor_whose_part_would_take_another_tensors_name_is_left_as_it_is() -> None:
    tensors = {"w": torch.zeros(1000), "w.mask": torch.ones(3), "v": torch.zeros(1000)}
    stored, shapes = pack(tensors)
    assert set(stored) == {"w", "w.mask", "v.mask", "v.values"}
    assert set(unpack(stored, shapes)) == set(tensors)


def test_a_transposed_tensor_is_packed_in_the_order_of_its_rows() -> None:
    tensor = sparse((40, 60), 0.2).T
    assert torch.equal(unpack(*pack({"w": tensor}))["w"], tensor)


def test_all_zeros_and_a_file_in_between_come_back(tmp_path: Path) -> None:
    tensors = {"zero": torch.zeros(50, 50), "w": sparse((64, 64), 0.3, torch.bfloat16), "b": torch.ones(4)}
    stored, shapes = pack(tensors)
    save_file(stored, tmp_path / "w.safetensors")
    back = unpack(load_file(tmp_path / "w.safetensors"), shapes)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(bits(back[name]), bits(tensor)) for name, tensor in tensors.items())


@pytest.mark.parametrize("damage", ["no mask", "no values", "a short mask", "a lost value"])
def test_parts_that_do_not_fit_are_a_damaged_artifact(damage: str) -> None:
    stored, shapes = pack({"w": sparse((100, 10), 0.1)})
    if damage.startswith("no"):
        del stored[f"w.{damage.split()[1]}"]
    elif damage == "a short mask":
        stored["w.mask"] = stored["w.mask"][:-1]
    else:
        stored["w.values"] = stored["w.values"][:-1]
    with pytest.raises(ArtifactError, match="packed weight 'w' is damaged"):
        unpack(stored, shapes)
