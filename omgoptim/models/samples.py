"""Batches for measurement: arrays by input name with targets, and synthetic ones of the same kind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omgoptim.errors import DataError
from omgoptim.models.forward import NamedBatch, to_numpy
from omgoptim.models.raw_batch import RawBatch, slice_samples
from omgoptim.runtimes.signature import Signature


@dataclass(frozen=True, slots=True)
class Samples:
    """Named batches and their targets (None without labels)."""

    batches: list[NamedBatch]
    targets: list[Any]

    @property
    def count(self) -> int:
        """Number of samples in all batches."""
        return sum(batch_length(batch) for batch in self.batches)

    def split(self, first: int) -> tuple[Samples, Samples]:
        """Split into the first `first` samples and the others."""
        head, tail = Samples([], []), Samples([], [])
        remaining = first
        for batch, target in zip(self.batches, self.targets, strict=True):
            size = batch_length(batch)
            here = min(remaining, size)
            for part, window in ((head, slice(0, here)), (tail, slice(here, size))):
                if window.stop > window.start:
                    part.batches.append({name: array[window] for name, array in batch.items()})
                    part.targets.append(slice_samples(target, window.start, window.stop))
            remaining -= here
        return head, tail

    def one_by_one(self) -> Samples:
        """Return the same samples, each as a batch of one."""
        single = Samples([], [])
        for batch, target in zip(self.batches, self.targets, strict=True):
            for row in range(batch_length(batch)):
                single.batches.append({name: array[row : row + 1] for name, array in batch.items()})
                single.targets.append(slice_samples(target, row, row + 1))
        return single

    def write(self, folder: Path) -> Path:
        """Write one .npz file per batch, named in order."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, batch in enumerate(self.batches):
            np.savez(folder / f"{index:06d}.npz", **batch)  # type: ignore[arg-type]
        return folder


def batch_length(batch: NamedBatch) -> int:
    """Return the number of samples in a batch."""
    return len(next(iter(batch.values())))


def shared_samples(first: Samples, second: Samples) -> int:
    """Return the number of samples that are, byte for byte, among the others."""
    digests = set(_digests(second))
    return sum(digest in digests for digest in _digests(first))


def _digests(samples: Samples) -> Iterator[bytes]:
    for batch in samples.batches:
        for row in range(batch_length(batch)):
            digest = hashlib.blake2b(digest_size=16)
            for array in batch.values():
                digest.update(array[row].tobytes())
            yield digest.digest()


def named_samples(named: Sequence[Sequence[tuple[str, Tensor, bool]]], raw: Sequence[RawBatch]) -> Samples:
    """Create samples from batches whose inputs have been named.

    Raises:
        DataError: inputs of one batch have different lengths, or a target has another length than its batch.
    """
    batches = [{name: to_numpy(tensor) for name, tensor, _ in batch} for batch in named]
    targets = []
    for batch, item in zip(batches, raw, strict=True):
        lengths = {name: len(array) for name, array in batch.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(
                "the inputs of a batch have different batch sizes",
                f"{lengths}; dimension 0 is the batch",
                "put the samples of every input along dimension 0, with padding where their sizes differ: of graphs, "
                "x (batch, nodes, features) with edge_index (batch, 2, edges)",
            )
        targets.append(_target(item.target, batch_length(batch)))
    return Samples(batches, targets)


def _target(target: Any, length: int) -> Any:
    """Convert a target to an array if possible; else keep the user's object."""
    if target is None:
        return None
    if isinstance(target, Tensor):
        target = to_numpy(target)
    try:
        array = np.asarray(target) if isinstance(target, (list, tuple, np.ndarray, int, float)) else None
    except (ValueError, TypeError, RuntimeError):  # lists of unequal length, tensors of several shapes
        return target
    if array is None or array.dtype == object:
        return target
    if array.ndim == 0:
        array = array[None]
    refuse_other_rows(array, length)
    return array


def refuse_other_rows(target: Sized, length: int) -> None:
    """Raise a DataError if a batch's target has another number of rows than samples."""
    if len(target) != length:
        raise DataError(
            f"a batch of {length} samples has a target with {len(target)} rows",
            "inputs and target need the same first dimension",
            "yield (inputs, target); three or more elements are read as (input, input, …, target)",
        )


def nan_samples(samples: Samples) -> list[tuple[int, str, NamedBatch]]:
    """Find samples whose floating inputs hold NaN: index, name of the input, and the sample as a batch of 1."""
    found, start = [], 0
    for batch in samples.batches:
        rows: dict[int, str] = {}
        for name, array in batch.items():
            if np.issubdtype(array.dtype, np.floating):
                has_nan = np.isnan(array).reshape(len(array), -1).any(1)
                rows |= dict.fromkeys(map(int, np.flatnonzero(has_nan)), name)
        found += [
            (start + row, rows[row], {name: array[row : row + 1] for name, array in batch.items()})
            for row in sorted(rows)
        ]
        start += batch_length(batch)
    return found


def repeat_to_size(samples: Samples, size: int) -> NamedBatch:
    """Return one batch of exactly `size` samples, the first batch repeated as often as needed."""
    first = samples.batches[0]
    rows = np.arange(size) % batch_length(first)
    return {name: np.ascontiguousarray(array[rows]) for name, array in first.items()}


def synthetic_like(batch: NamedBatch, seed: int) -> NamedBatch:
    """Draw random inputs in the range of real ones, so that an artifact contains no user data."""
    random = np.random.default_rng(seed)

    def draw(array: NDArray[Any]) -> NDArray[Any]:
        same: NDArray[Any] = np.array(array)
        if np.issubdtype(array.dtype, np.floating):
            finite = array[np.isfinite(array)].astype(np.float64)  # a mask may hold -inf
            if not finite.size:
                return same
            values = random.normal(float(finite.mean()), float(finite.std()) or 1.0, array.shape)
            clipped: NDArray[Any] = values.clip(float(finite.min()), float(finite.max())).astype(array.dtype)
            return clipped
        if not array.size:
            return same
        constant: NDArray[Any] = np.full_like(array, array.flat[0])
        if (array == constant).all():
            return constant
        mask: NDArray[Any] = np.ones_like(array)
        if set(np.unique(array)) <= {0, 1}:
            return mask  # all real
        integers: NDArray[Any] = random.integers(int(array.min()), int(array.max()) + 1, array.shape).astype(
            array.dtype
        )
        return integers

    return {name: draw(array) for name, array in batch.items()}


def as_tensors(batch: NamedBatch, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """Convert a numpy batch to torch tensors in the signature's dtypes."""
    return {name: torch.from_numpy(array).to(getattr(torch, dtypes[name])) for name, array in batch.items()}


def forward_args(
    signature: Signature, batch: NamedBatch, device: str | torch.device = "cpu"
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the positional and keyword arguments of a module's forward for a numpy batch."""
    tensors = as_tensors(batch, signature.dtypes)
    return signature.to_call({name: tensor.to(device) for name, tensor in tensors.items()})
