"""Grouping of a checkpoint's tensors by the prefix before a model's keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Entry = tuple[tuple[str, ...], str, Tensor]
"""Nesting, key and tensor."""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Key components of DistributedDataParallel and AveragedModel, torch.compile, FSDP and activation checkpointing."""

SPELLINGS = (
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
    ("parametrizations.weight.original", "weight_orig"),
    ("parametrizations.weight.0._u", "weight_u"),
    ("parametrizations.weight.0._v", "weight_v"),
    ("weight", "gamma"),
    ("bias", "beta"),
)
"""Two endings of one entry: torch.nn.utils.parametrizations and the older weight_norm and spectral_norm; the names of a
norm's scale and shift in older checkpoints."""

COUNTER = "num_batches_tracked"
"""A buffer of BatchNorm that torch's own strict loading does without, in checkpoints from before it existed."""

AVERAGES = frozenset({"ema", "swa", "averaged", "shadow"})
"""Words in the name of a set of averaged weights: `state_dict_ema`, `swa_model`, `ema.shadow`."""


@dataclass(slots=True)
class EntrySet:
    """The entries of a file under one prefix."""

    nest: tuple[str, ...]
    prefix: tuple[str, ...]
    found: dict[str, list[tuple[str, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    """The model's key to the file's key and tensor; several where wrappers make two keys one."""

    @property
    def name(self) -> str:
        return ".".join((*self.nest, *self.prefix)) or "the file's top level"

    @property
    def averaged(self) -> bool:
        return any(word in AVERAGES for part in (*self.nest, *self.prefix) for word in part.lower().split("_"))


def iterate_tensors(loaded: Mapping[Any, Any], nest: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Yield nesting, key and tensor of every tensor in the file."""
    for key, value in loaded.items():
        if isinstance(value, Tensor):
            yield nest, str(key), value
        elif isinstance(value, Mapping):
            yield from iterate_tensors(value, (*nest, str(key)))


def key_parts(key: str) -> tuple[str, ...]:
    """Split a key into components without wrappers; an entry named like a wrapper keeps its name."""
    *path, last = key.split(".")
    return (*(part for part in path if part not in WRAPPERS), last)


def _keys_by_spelling(own: Mapping[str, Tensor]) -> dict[tuple[str, ...], list[str]]:
    """Map every spelling of the model's keys, as components, to the keys."""
    plain = {key: key_parts(key) for key in own}
    if len(set(plain.values())) < len(own):  # the model has parts of its own that are called like wrappers
        plain = {key: tuple(key.split(".")) for key in own}
    by_spelling: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, parts in plain.items():
        by_spelling[parts].append(key)
    exact = set(by_spelling)
    for key, parts in plain.items():
        for spelling in _spellings(parts):
            if spelling not in exact:
                by_spelling[spelling].append(key)
    return by_spelling


def _spellings(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    joined = "." + ".".join(parts)
    for pair in SPELLINGS:
        for one, other in (pair, pair[::-1]):
            if joined.endswith(f".{one}"):
                yield tuple((joined.removesuffix(one) + other)[1:].split("."))


def entry_sets(entries: Sequence[Entry], own: Mapping[str, Tensor]) -> list[EntrySet]:
    """Group the entries by the prefix before the model's keys, the shortest prefix first.

    Where no prefix has the whole model, the file's keys may lack what all of the model's begin with.
    """
    by_spelling = _keys_by_spelling(own)
    tied, needed = tied_keys(own), needed_keys(own)
    depth = 0
    while True:
        shortened = {parts[depth:]: keys for parts, keys in by_spelling.items() if len(parts) > depth}
        sets = _by_prefix(entries, shortened)
        if any(needed <= filled_keys(one, tied) for one in sets):
            return sets
        heads = {parts[: depth + 1] for parts in by_spelling}
        if len(heads) != 1 or any(len(parts) <= depth + 1 for parts in by_spelling):
            return _by_prefix(entries, by_spelling)
        depth += 1


def _by_prefix(entries: Sequence[Entry], by_spelling: Mapping[tuple[str, ...], Sequence[str]]) -> list[EntrySet]:
    sets: dict[tuple[tuple[str, ...], tuple[str, ...]], EntrySet] = {}
    respelled: list[tuple[EntrySet, str, str, Tensor]] = []
    for nest, key, tensor in entries:
        plain, raw = key_parts(key), tuple(key.split("."))
        for parts in dict.fromkeys((plain, raw)):
            for start in range(len(parts)):
                for name in by_spelling.get(parts[start:], ()):
                    one = sets.setdefault((nest, parts[:start]), EntrySet(nest, parts[:start]))
                    if not _same_ending(key, name):
                        respelled.append((one, name, key, tensor))
                    elif all(known != key for known, _ in one.found[name]):
                        one.found[name].append((key, tensor))
    for one, name, key, tensor in respelled:  # only where the model's own spelling is not there
        if name not in one.found:
            one.found[name].append((key, tensor))
    return sorted(sets.values(), key=lambda one: (len(one.nest), len(one.prefix)))


def _same_ending(key: str, name: str) -> bool:
    return key.rpartition(".")[2] == name.rpartition(".")[2]


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def tied_keys(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Map each key to all keys of the same memory, itself included."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for key, tensor in own.items():
        groups[_memory(tensor) if tensor.numel() and tensor.untyped_storage().data_ptr() else key].append(key)
    return {key: group for group in groups.values() for key in group}


def needed_keys(own: Mapping[str, Tensor]) -> set[str]:
    """Return the keys that a checkpoint must have: all but the counters of BatchNorm."""
    return {key for key in own if key.rpartition(".")[2] != COUNTER}


def filled_keys(one: EntrySet, tied: Mapping[str, list[str]]) -> set[str]:
    """Return the model's keys that a set fills, tied keys included."""
    return {alias for key in one.found for alias in tied[key]}
