"""Data of a step: its evaluation samples are selection samples, so that no step reads the evaluation data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omgoptim.errors import DataError, OmgoptimError
from omgoptim.models.data import DataSource, Split
from omgoptim.models.manifest import Manifest
from omgoptim.models.raw_batch import RawBatch, batch_size, slice_samples, take_samples
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.training.modes import own_randomness, seed_everything

MAX_SELECTION, MAX_CALIBRATION = 2000, 2000
"""Maximum samples of the calibration split for evaluating steps, and for their calibration and selection."""

MIN_SELECTION, MIN_TRAINING = 16, 16
"""Minimum number of selection and of training samples: with 16 the standard error of an accuracy is up to 0.125."""


def selection_as_evaluation(data: DataSource) -> DataSource:
    """Return the same data with split `eval` taken from the second half of the calibration split.

    Steps calibrate and select on the first half. Training samples that are also in the second half are removed, so that
    no step is evaluated on its training data: data sets without a train split often return calibration samples for it.

    Raises:
        DataError: the calibration split has too few samples to divide.
    """
    total = sum(batch_size(raw.inputs) for raw in take_samples(_in_fixed_order(data), MAX_SELECTION + MAX_CALIBRATION))
    selection = min(total // 2, MAX_SELECTION)
    if selection < MIN_SELECTION:
        raise DataError(
            f"the calibration split has {total} samples, too few to choose with",
            "steps are evaluated on half of them, and never on the evaluation data",
            f"let load('calibration') give at least {2 * MIN_SELECTION}, better a few hundred",
        )
    calibration = min(total - selection, MAX_CALIBRATION)

    chosen = calibration, calibration + selection
    held_out = {key for raw in _window(_in_fixed_order(data), *chosen) for key in _keys(raw)}

    def apart(batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
        for raw in batches:
            kept = [index for index, key in enumerate(_keys(raw)) if key not in held_out]
            if len(kept) == batch_size(raw.inputs):
                yield raw
            elif kept:
                yield RawBatch(_rows(raw.inputs, kept), _rows(raw.target, kept))

    def batches(split: Split) -> Iterator[RawBatch]:
        if split == "train":
            return apart(data.batches("train"))
        return _window(_in_fixed_order(data), *((0, calibration) if split == "calibration" else chosen))

    return replace(data, batches=batches, epoch=lambda size: apart(data.epoch(size)))


def training_problem(data: DataSource) -> str | None:
    """Return why nothing can be trained; None where training samples are left beside the selection samples.

    `data` is what steps see: `selection_as_evaluation`.
    """
    if not data.real:
        return "no data was given: pruning and distillation need training samples"
    try:
        found = take_samples(data.batches("train"), MIN_TRAINING)
    except OmgoptimError as error:
        return f"the train split cannot be read: {error.why or error.what}"
    count = sum(batch_size(raw.inputs) for raw in found)
    if count < MIN_TRAINING:
        return f"only {count} training samples are left beside the selection samples: too few to train on"
    return None


def data_identity(data: DataSource, samples: int = MAX_SELECTION + MAX_CALIBRATION) -> str:
    """Return a hash of the calibration split, which distinguishes data sets of the same name."""
    digest = hashlib.sha256()
    for raw in take_samples(_in_fixed_order(data), samples):
        for key in _keys(raw):
            digest.update(key)
    return digest.hexdigest()[:16]


def weights_identity(loaded: LoadedModel) -> str:
    """Return a hash of the files of the original's artifact, which distinguishes models of the same name."""
    files = Manifest.read(loaded.baseline).files
    return hashlib.sha256(json.dumps(files, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _keys(raw: RawBatch) -> list[bytes]:
    """Return a hash of the inputs of each sample."""
    arrays = list(_arrays(raw.inputs))
    count = batch_size(raw.inputs)
    keys = []
    for index in range(count):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(np.ascontiguousarray(array[index]).tobytes() if len(array) == count else b"")
        keys.append(digest.digest())
    return keys


def _arrays(inputs: Any) -> Iterator[NDArray[Any]]:
    if isinstance(inputs, Mapping):
        inputs = tuple(inputs[name] for name in sorted(inputs))
    if isinstance(inputs, (tuple, list)):
        for part in inputs:
            yield from _arrays(part)
    elif isinstance(inputs, torch.Tensor):
        plain = inputs.detach().cpu()
        yield (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    elif isinstance(inputs, np.ndarray) and inputs.ndim:
        yield inputs


def _rows(value: Any, kept: Sequence[int]) -> Any:
    """Return the samples of a batch's part at these places."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: _rows(item, kept) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(item, kept) for item in value)
    return value[list(kept)] if hasattr(value, "shape") else [value[index] for index in kept]


def _in_fixed_order(data: DataSource) -> Iterator[RawBatch]:
    """Yield the calibration split in the same order every time, even from a loader that shuffles."""
    with own_randomness():
        seed_everything(0)
        batches = data.batches("calibration")
        first = next(batches, None)
    if first is not None:
        yield first
        yield from batches


def _window(batches: Iterator[RawBatch], first: int, last: int) -> Iterator[RawBatch]:
    """Yield samples first..last of a split, batch by batch."""
    begin = 0
    for raw in batches:
        size = batch_size(raw.inputs)
        start, stop = max(first - begin, 0), min(last - begin, size)
        if start < stop:
            yield RawBatch(slice_samples(raw.inputs, start, stop), slice_samples(raw.target, start, stop))
        begin += size
        if begin >= last:
            return
