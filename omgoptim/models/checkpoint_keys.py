"""Keys of a checkpoint and of a model: grouping by prefix, spellings, and notes on what was dropped or filled.

A file's keys are matched by the longest common suffix: the rest is a prefix, and one prefix must hold for the whole
model. Components of wrappers (`module.`, `_orig_mod.`) are dropped, and parametrized and older spellings of a key are
recognized.
"""

from __future__ import annotations

from collections import Counter, defaultdict
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

AVERAGES = frozenset({"ema", "swa", "averaged", "avg", "average", "shadow"})
"""Words in the name of a set of averaged weights: `state_dict_ema`, `swa_model`, `ema.shadow`."""

AVERAGED_COUNT = "n_averaged"
"""Counter of torch.optim.swa_utils.AveragedModel beside its `module.`."""

LIGHTNING = ("averaging_state", "state_dict")
"""Where Lightning's WeightAveraging callback stores that counter, and beside it the averaged weights; the plain ones
are under `current_model_state`."""

LEFTOVERS = frozenset({"total_ops", "total_params", "masked_bias", "inv_freq"})
"""Floating entries that are no weights: thop's counters, and buffers that transformers no longer saves."""


@dataclass(slots=True)
class EntrySet:
    """The entries of a file under one prefix."""

    nest: tuple[str, ...]
    prefix: tuple[str, ...]
    found: dict[str, list[tuple[str, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    """The model's key to the file's key and tensor; several where wrappers make two keys one."""
    counted: bool = False
    """A count of averaged models lies beside it, as torch's AveragedModel stores it."""

    @property
    def name(self) -> str:
        """Return the nesting and the prefix as one dotted name."""
        return ".".join((*self.nest, *self.prefix)) or "the file's top level"

    @property
    def averaged(self) -> bool:
        """Return whether the name, or a count of averaged models, says that these are averaged weights."""
        words = (word for part in (*self.nest, *self.prefix) for word in part.lower().split("_"))
        return self.counted or not AVERAGES.isdisjoint(words)


def iterate_tensors(loaded: Mapping[Any, Any], nest: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Yield nesting, key and tensor of every tensor with values in the file."""
    for key, value in loaded.items():
        if isinstance(value, Tensor) and not value.is_meta:
            yield nest, str(key), value
        elif isinstance(value, Mapping):
            yield from iterate_tensors(value, (*nest, str(key)))


def key_parts(key: str) -> tuple[str, ...]:
    """Split a key into components without wrappers; an entry named like a wrapper keeps its name."""
    *path, last = key.split(".")
    return (*(part for part in path if part not in WRAPPERS), last)


def _keys_by_spelling(model_state: Mapping[str, Tensor]) -> dict[tuple[str, ...], list[str]]:
    """Map every spelling of the model's keys, as components, to the keys."""
    plain = {key: key_parts(key) for key in model_state}
    if len(set(plain.values())) < len(model_state):  # the model has parts of its own that are called like wrappers
        plain = {key: tuple(key.split(".")) for key in model_state}
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
        for first, second in (pair, pair[::-1]):
            if joined.endswith(f".{first}"):
                yield tuple((joined.removesuffix(first) + second)[1:].split("."))


def entry_sets(entries: Sequence[Entry], model_state: Mapping[str, Tensor]) -> list[EntrySet]:
    """Group the entries by the prefix before the model's keys, the shortest prefix first.

    Where no prefix has the whole model, the file's keys may lack what all of the model's begin with.
    """
    by_spelling = _keys_by_spelling(model_state)
    tied, needed = tied_keys(model_state), needed_keys(model_state)
    depth = 0
    while True:
        shortened = {parts[depth:]: keys for parts, keys in by_spelling.items() if len(parts) > depth}
        sets = _by_prefix(entries, shortened)
        if any(needed <= filled_keys(entry_set, tied) for entry_set in sets):
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
                    entry_set = sets.setdefault((nest, parts[:start]), EntrySet(nest, parts[:start]))
                    if key.rpartition(".")[2] != name.rpartition(".")[2]:
                        respelled.append((entry_set, name, key, tensor))
                    elif all(known != key for known, _ in entry_set.found[name]):
                        entry_set.found[name].append((key, tensor))
    for entry_set, name, key, tensor in respelled:  # only where the model's own spelling is not there
        if name not in entry_set.found:
            entry_set.found[name].append((key, tensor))
    counters = {(nest, key_parts(key)[:-1]) for nest, key, _ in entries if key.rpartition(".")[2] == AVERAGED_COUNT}
    for entry_set in sets.values():
        counted = (entry_set.nest, tuple(part for part in entry_set.prefix if part not in WRAPPERS)) in counters
        lightning = entry_set.nest[-1:] == LIGHTNING[1:] and ((*entry_set.nest[:-1], LIGHTNING[0]), ()) in counters
        entry_set.counted = counted or lightning
    return sorted(sets.values(), key=lambda entry_set: (len(entry_set.nest), len(entry_set.prefix)))


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def tied_keys(model_state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Map each key to all keys of the same memory, itself included."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for key, tensor in model_state.items():
        groups[_memory(tensor) if tensor.numel() and tensor.untyped_storage().data_ptr() else key].append(key)
    return {key: group for group in groups.values() for key in group}


def needed_keys(model_state: Mapping[str, Tensor]) -> set[str]:
    """Return the keys that a checkpoint must have: all but the counters of BatchNorm."""
    return {key for key in model_state if key.rpartition(".")[2] != COUNTER}


def filled_keys(entry_set: EntrySet, tied: Mapping[str, list[str]]) -> set[str]:
    """Return the model's keys that a set fills, tied keys included."""
    return {alias for key in entry_set.found for alias in tied[key]}


def prefix_notes(chosen: EntrySet) -> list[str]:
    """Describe the nesting, the prefixes before every key, and the wrappers inside keys."""
    notes = [f"the weights were under '{nest}'" for nest in chosen.nest]
    keys = [(file_entries[0][0].split("."), name.split(".")) for name, file_entries in chosen.found.items()]
    before = []
    for raw, name in keys:
        same = 0
        while same < min(len(raw), len(name)) and raw[-1 - same] == name[-1 - same]:
            same += 1
        before.append(raw[: len(raw) - same])
    common = min(before, key=len) if before else []
    common = common if all(raw[: len(common)] == common for raw, _ in keys) else []
    skip = len(common)
    notes += [f"the prefix '{part}.' was dropped" for part in common]
    inside = Counter(part for raw, name in keys for part in raw[skip:-1] if part in WRAPPERS and part not in name)
    notes += [f"'{part}.' was dropped inside {count} keys" for part, count in inside.items()]
    lacking = Counter(raw[-1] for raw, name in keys if raw[-1] != name[-1])
    notes += [f"'{ending}' was mapped to this model's names ({count} keys)" for ending, count in lacking.items()]
    return notes


def cast_notes(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> list[str]:
    """Count the tensors whose dtype the model changes."""
    pairs = Counter(
        (_dtype(tensor), _dtype(model_state[key]))
        for key, tensor in state.items()
        if tensor.dtype != model_state[key].dtype
    )
    return [
        f"{count} tensors were cast from {in_file} to the model's {in_model}"
        for (in_file, in_model), count in pairs.items()
    ]


def filling_notes(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> list[str]:
    """Name the entries that a tied weight or the model itself fills."""
    tied = tied_keys(model_state)
    notes = []
    shared = [key for key in model_state if key not in state and any(alias in state for alias in tied[key])]
    if shared:
        notes.append(f"{listed(shared)}: taken from the weight that it is tied to")
    counters = [key for key in model_state if key not in state and key not in shared]
    if counters:
        notes.append(f"the file lacks {COUNTER} of {len(counters)} norms, which evaluation does not use")
    return notes


def nan_notes(state: Mapping[str, Tensor]) -> list[str]:
    """Name the entries that hold NaN, as those of a diverged training do."""
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and tensor.isnan().any()]
    return [f"weights contain NaN: {listed(broken)}"] if broken else []


def left_out_notes(fitting: Sequence[EntrySet], entries: Sequence[Entry]) -> list[str]:
    """Return the tensors that are in no set which fits the model."""
    used = {
        (entry_set.nest, key)
        for entry_set in fitting
        for file_entries in entry_set.found.values()
        for key, _ in file_entries
    }
    unused = [".".join((*nest, key)) for nest, key, _ in entries if (nest, key) not in used]
    beside = [name for name in unused if not _of_optimizer(name)]
    return [f"ignored, since the model has no such key: {listed(beside)}"] if beside else []


def _of_optimizer(name: str) -> bool:
    return name.startswith(("optimizer", "scheduler", "lr_scheduler", "scaler", "rng", "callbacks", "loops"))


def unexpected_keys(chosen: EntrySet, entries: Sequence[Entry], model_state: Mapping[str, Tensor]) -> list[str]:
    """Return the file's keys beside the chosen ones that belong to layers which the model lacks."""
    used = {key for file_entries in chosen.found.values() for key, _ in file_entries}
    heads = {key_parts(name)[0] for name in model_state if "." in name}
    found = []
    for nest, key, tensor in entries:
        parts = key_parts(key)
        inner = parts[len(chosen.prefix) :]
        if nest != chosen.nest or key in used or parts[: len(chosen.prefix)] != chosen.prefix or len(inner) < 2:
            continue
        known = inner[0] in heads or inner[0].isdigit()
        if known and tensor.is_floating_point() and inner[-1] not in LEFTOVERS:
            found.append(key)
    return found


def mismatched_entries(entry_set: EntrySet, model_state: Mapping[str, Tensor]) -> list[str]:
    """Return the entries of a set whose shape differs, or that are integer on one side and floating on the other."""
    mismatched = []
    for key, file_entries in entry_set.found.items():
        in_file, in_model = file_entries[0][1], model_state[key]
        if in_file.shape != in_model.shape:
            mismatched.append(
                f"{key} has shape {tuple(in_file.shape)} in the file and {tuple(in_model.shape)} in the model"
            )
        elif in_file.is_floating_point() != in_model.is_floating_point():
            mismatched.append(f"{key} is {_dtype(in_file)} in the file and {_dtype(in_model)} in the model")
    return mismatched


def listed(keys: Sequence[str], limit: int = 5) -> str:
    """Join the first keys, and count the others: an error of a whole ResNet would name hundreds."""
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
