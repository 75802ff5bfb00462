"""Batches in the user's form: separation of targets, parts of them, and collation of samples.

Samples may have absent targets and variable lengths, and come as lists of samples or of batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from omgoptim.errors import DataError
from omgoptim.models.forward import attached, name_inputs
from omgoptim.models.labels import IGNORED
from omgoptim.runtimes.signature import flatten

TARGET_KEYS = ("labels", "label", "target", "targets", "y")
"""Keys under which data sets yield their targets, in order of preference."""

MASK = "attention_mask"
"""Input name of Hugging Face's attention masks."""

MAX_EXAMINED = 16
"""Entries of a list that are examined to distinguish samples from batches. Chosen: each may be a file that is read."""


@dataclass(frozen=True, slots=True)
class RawBatch:
    """A batch in the user's form: inputs of any kind, target or None."""

    inputs: Any
    target: Any = None


def split_target(item: Any) -> RawBatch:
    """Separate the inputs and the target of a batch or sample.

    `(inputs, target)`, `(x1, x2, …, target)`, a dict with labels, `(dict with labels, None)`, a dict whose one other
    entry is the dict of inputs, or inputs alone.
    """
    if isinstance(item, Mapping):
        key = next((key for key in TARGET_KEYS if key in item), None)
        inputs = {k: v for k, v in item.items() if k != key}
        target = item[key] if key else None
        inner = next(iter(inputs.values())) if len(inputs) == 1 else None
        if isinstance(inner, Mapping):
            nested = split_target(inner)
            return RawBatch(nested.inputs, nested.target if target is None else target)
        return RawBatch(inputs, target)
    if isinstance(item, (tuple, list)):
        if len(item) == 1:
            return split_target(item[0]) if isinstance(item[0], Mapping) else RawBatch(item[0])
        if len(item) == 2:
            if item[1] is None and isinstance(item[0], Mapping):
                return split_target(item[0])
            return RawBatch(tuple(item[0]) if isinstance(item[0], list) else item[0], item[1])
        return RawBatch(tuple(item[:-1]), item[-1])
    return RawBatch(item)


def take_samples(batches: Iterable[RawBatch], samples: int) -> list[RawBatch]:
    """Collect batches until `samples` samples are reached; the last batch is cut."""
    collected: list[RawBatch] = []
    count = 0
    for raw in batches:
        size = batch_size(raw.inputs)
        if not size:
            continue
        keep = min(size, samples - count)
        collected.append(
            raw if keep == size else RawBatch(slice_samples(raw.inputs, keep), slice_samples(raw.target, keep))
        )
        count += keep
        if count >= samples:
            break
    return collected


def batch_size(inputs: Any) -> int:
    """Return the samples in a batch: the length of its first input."""
    first = inputs
    while isinstance(first, (Mapping, tuple, list)):
        if not first:
            raise DataError("a batch of the data has no inputs")
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    if not hasattr(first, "shape") or not first.shape:
        raise DataError(
            f"the first input of a batch is a {type(first).__name__}", "a tensor with a batch dimension is needed"
        )
    return int(first.shape[0])


def slice_samples(value: Any, start: int, stop: int | None = None) -> Any:
    """Return the first `start` samples of a part of a batch, or samples start..stop."""
    window = slice(start) if stop is None else slice(start, stop)
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: slice_samples(item, start, stop) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(slice_samples(item, start, stop) for item in value)
    return value[window]


@dataclass(slots=True)
class Collation:
    """Collation of one data source: properties of the model, and the decisions made so far."""

    module: nn.Module | None = None
    """Model whose forward is tried; None for a program."""
    ranks: Sequence[int] = ()
    """Dimensions of each input with its batch, if a program's signature has them."""
    notes: list[str] = field(default_factory=list)
    """Notes on the decisions, each once."""
    padded: bool = False
    """Samples of different lengths occurred and the model takes a mask; applies to all splits afterwards."""

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def batches(self, samples: Any, batch: int, shuffled: bool) -> Iterator[RawBatch]:
        """Yield batches of a Dataset or list of samples.

        Uses the `collate_fn` of the data set, or else of the model, if it has one. Samples of different lengths are
        padded, with an attention mask, if the model takes one; else each batch holds samples of one length.
        """
        collate_fn = getattr(samples, "collate_fn", None) or getattr(self.module, "collate_fn", None)
        if callable(collate_fn):
            loader: Iterable[Any] = DataLoader(samples, batch_size=batch, shuffle=shuffled, collate_fn=collate_fn)
            yield from map(split_target, loader)
            return
        loader = DataLoader(samples, batch_size=batch, shuffle=shuffled, collate_fn=list)
        waiting: dict[Any, list[Any]] = {}
        for group in loader:
            _refuse_some_absent([split_target(sample).target for sample in group])
            if not self.padded and self._takes_mask and len({_shapes(sample) for sample in group}) > 1:
                self.padded = True
                self.note(f"samples of different lengths were padded, and {MASK} was created for them")
            if self.padded:
                yield self._padded(group)
                continue
            for sample in group:
                waiting.setdefault(_shapes(sample), []).append(sample)
            if len(waiting) > 1:
                self.note("samples differ in shape: each batch has samples of one shape")
            for shape in [
                shape for shape, group_of_shape in waiting.items() if len(group_of_shape) >= batch or len(waiting) == 1
            ]:
                yield split_target(collate(waiting.pop(shape)))
        for group_of_shape in waiting.values():
            yield split_target(collate(group_of_shape))

    def are_samples(self, loaded: Any) -> bool:
        """Return whether the entries of a list are samples without a batch dimension, judged by their ranks.

        Decided in this order: ranks that a program declares; a single number as target; targets of one dimension beside
        inputs of more; the form on which the model runs; lengths that differ before the last entry.

        Raises:
            DataError: the model runs on both forms and answers differently, so that no rank says which is meant.
        """
        if not (hasattr(loaded, "__len__") and hasattr(loaded, "__getitem__")) or isinstance(loaded, DataLoader):
            return False
        raws = [split_target(loaded[index]) for index in range(min(len(loaded), MAX_EXAMINED))]
        shapes = [_first_shape(raw.inputs) for raw in raws]
        if not raws or any(shape is None for shape in shapes):
            return False
        known_shapes = [shape for shape in shapes if shape is not None]
        rank = len(known_shapes[0])
        if rank == 0 or (self.ranks and rank in (self.ranks[0] - 1, self.ranks[0])):
            return rank == 0 or rank == self.ranks[0] - 1
        target = _shape(raws[0].target)
        if target == () and any(shape[0] != 1 for shape in known_shapes):
            return True
        if target is not None and len(target) == 1 and rank > 1 and target[0] == known_shapes[0][0]:
            return False
        single = RawBatch(collate([raws[0].inputs]))
        as_batch, as_sample = self._outputs(raws[0].inputs), self._outputs(single.inputs)
        if as_batch is None or as_sample is None:
            return as_sample is not None
        if len({shape[0] for shape in known_shapes[:-1]}) > 1:
            return True
        if len(raws) > 1 and not _same_outputs(as_batch, as_sample):
            raise DataError(
                "the entries of the data's list could be batches or samples",
                f"their inputs are {known_shapes[0]}; the model runs on them both with and without an added batch "
                "dimension, with different outputs",
                "samples: return a Dataset such as torch.utils.data.TensorDataset(inputs, targets); batches: return "
                "iter(list)",
            )
        return False

    @property
    def _takes_mask(self) -> bool:
        return self.module is not None and MASK in inspect.signature(self.module.forward).parameters

    def _padded(self, samples: Sequence[Any]) -> RawBatch:
        raws = [split_target(sample) for sample in samples]
        first = next(iter(inspect.signature(self.module.forward).parameters)) if self.module else "input"
        pad = getattr(getattr(self.module, "config", None), "pad_token_id", None) or 0
        named = []
        for raw in raws:
            inputs = dict(raw.inputs) if isinstance(raw.inputs, Mapping) else {first: raw.inputs}
            if MASK not in inputs:
                inputs[MASK] = torch.ones(len(next(iter(inputs.values()))), dtype=torch.long)
            named.append(inputs)
        main = next(iter(named[0]))
        inputs = {key: _stacked([one[key] for one in named], pad if key == main else 0) for key in named[0]}
        if all(raw.target is None for raw in raws):
            return RawBatch(inputs)
        return RawBatch(inputs, _stacked([raw.target for raw in raws], IGNORED))

    def _outputs(self, inputs: Any) -> list[Tensor] | None:
        """Return the model's outputs for these inputs as a batch; None where it does not accept them."""
        if self.module is None:
            return None
        hooks = (layer.register_forward_pre_hook(_refuse_unbatched) for layer in self.module.modules())
        try:
            named = name_inputs(self.module, inputs)
            with attached(hooks), torch.inference_mode():
                args = [tensor for _, tensor, keyword in named if not keyword]
                result = self.module(*args, **{name: tensor for name, tensor, keyword in named if keyword})
        except Exception:  # noqa: BLE001  whatever the user's forward raises says the same: not in this form
            return None
        return [leaf for leaf in flatten(result) if isinstance(leaf, Tensor)]


def collate(samples: Sequence[Any]) -> Any:
    """Stack samples of the same structure and shapes into one batch; a part that is None in all stays None.

    Raises:
        DataError: a part is None in some samples only, or a key is missing.
    """
    first = samples[0]
    if _refuse_some_absent(samples):
        return None
    if isinstance(first, Mapping):
        other = next((sample for sample in samples if sample.keys() != first.keys()), None)
        if other is not None:
            raise DataError(
                "samples have different keys",
                f"one has {', '.join(map(str, first))}; another {', '.join(map(str, other))}",
            )
        return {key: collate([sample[key] for sample in samples]) for key in first}
    if isinstance(first, (tuple, list)) and not _is_numbers(first):
        return tuple(collate(part) for part in zip(*samples, strict=True))
    if _is_numbers(first):
        return torch.stack([torch.as_tensor(sample) for sample in samples])
    return default_collate(list(samples))


def _refuse_some_absent(values: Sequence[Any]) -> bool:
    """Return whether all are None; raise a DataError if only some are."""
    absent = sum(value is None for value in values)
    if 0 < absent < len(values):
        raise DataError(
            "some samples of the data have a target, others have None",
            f"{absent} of {len(values)} samples of a batch have none",
            "give every sample a target (-100 to ignore it), or give none",
        )
    return bool(absent)


def _stacked(values: Sequence[Any], fill: int) -> Tensor:
    """Stack tensors of the same number of dimensions, padded at the end to the largest size."""
    tensors = [torch.as_tensor(value) for value in values]
    if len({tensor.ndim for tensor in tensors}) > 1:
        raise DataError(
            "samples have different numbers of dimensions",
            f"one has shape {tuple(tensors[0].shape)}",
            "give the DataLoader your own collate_fn",
        )
    whole = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = tensors[0].new_full((len(tensors), *whole), fill)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return stacked


def _shapes(sample: Any) -> Any:
    """Return the structure of a sample with the shape of every tensor in it."""
    if isinstance(sample, Mapping):
        return tuple((key, _shapes(value)) for key, value in sample.items())
    if isinstance(sample, (tuple, list)) and not _is_numbers(sample):
        return tuple(_shapes(value) for value in sample)
    return _shape(sample)


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor, an array, a number or a list of numbers; None of anything else."""
    if isinstance(value, (Tensor, np.ndarray)):
        return tuple(value.shape)
    if isinstance(value, (int, float, np.generic)):
        return ()
    return np.shape(value) if _is_numbers(value) else None


def _first_shape(inputs: Any) -> tuple[int, ...] | None:
    while isinstance(inputs, Mapping) or (isinstance(inputs, (tuple, list)) and not _is_numbers(inputs)):
        if not inputs:
            return None
        inputs = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
    return _shape(inputs)


def _is_numbers(value: Any) -> bool:
    """Return whether the value is a list of numbers, which stands for a tensor."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], (int, float))


def _same_outputs(as_batch: Sequence[Tensor], as_sample: Sequence[Tensor]) -> bool:
    """Return whether outputs for a batch are those for the same values as one sample, up to rounding."""
    of_any = torch.complex128  # holds integers, floats and complex numbers
    return len(as_batch) == len(as_sample) and all(
        batch.shape == sample.shape[1:] and torch.allclose(batch.to(of_any), sample[0].to(of_any), 1e-3, 1e-5)
        for batch, sample in zip(as_batch, as_sample, strict=True)
    )


def _refuse_unbatched(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Raise where a layer that accepts inputs with and without a batch gets one without."""
    shape = getattr(args[0], "ndim", None) if args else None
    spatial = isinstance(layer, nn.modules.conv._ConvNd) and shape == layer.weight.ndim - 1
    if spatial or (isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)) and shape == 2):
        raise ValueError("no batch dimension")
