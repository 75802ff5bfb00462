"""Which tensor of a checkpoint belongs to which entry of a model's state dict.

A file's keys are matched by the longest common suffix: whatever stands before the model's own key is a prefix, and one
prefix must hold for the whole model. What wrappers put in (`module.`, `_orig_mod.`) is dropped wherever it stands, and
parametrized and older spellings of a key are understood. Two sets that fit are never guessed between, except that
averaged weights (EMA, SWA) are taken before the plain ones beside them, which `weights` decides and the notes say.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from omgoptim.errors import ModelError, argument

Entry = tuple[tuple[str, ...], str, Tensor]
"""Nesting, key and tensor."""

WeightSet = Literal["auto", "ema", "plain"]

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What DistributedDataParallel and AveragedModel, torch.compile, FSDP and activation checkpointing put into keys."""

AVERAGES = frozenset({"ema", "swa", "averaged", "shadow"})
"""Words in the name of a set of averaged weights: `state_dict_ema`, `swa_model`, `ema.shadow`."""

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

LEFTOVERS = frozenset({"total_ops", "total_params", "masked_bias", "inv_freq"})
"""Floating entries that are no weights: thop's counters, and buffers that transformers no longer saves."""

NAMED = 5
"""How many keys a sentence names."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a checkpoint gives a model."""

    state: dict[str, Tensor]
    """Every entry of the model's state dict that the file or a tied entry fills."""
    notes: list[str]
    """What was understood, cast, filled and left out on the way."""


@dataclass(slots=True)
class _Set:
    """The entries of a file that stand under one prefix."""

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


def fit(loaded: Mapping[Any, Any], own: Mapping[str, Tensor], weights: WeightSet = "auto") -> Fit:
    """Match a checkpoint's tensors with a model's.

    Args:
        loaded: what the file holds; mappings may be nested.
        own: the model's state dict, tensors only; entries that share memory are one weight.
        weights: which of a file's averaged and plain weights are meant; auto: averaged where there are any.

    Raises:
        ModelError: entries are missing or have other shapes, the file has weights for layers that the model lacks,
            several sets of weights fit, or there is none of the kind that `weights` asks for.
    """
    entries = list(_tensors(loaded))
    tied, needed = _tied(own), _needed(own)
    sets = _sets(entries, own)
    whole = [one for one in sets if needed <= _filled(one, tied)]
    fitting = [one for one in whole if not _unlike(one, own)]
    if not fitting:
        raise _misfit(entries, sets, whole, own)
    chosen, notes = _choose(fitting, weights)
    state = {key: _only(key, some) for key, some in chosen.found.items()}
    unknown = _unexpected(chosen, entries, own)
    if unknown:  # another architecture
        raise _does_not_fit([("unexpected", unknown)])
    left = _left_out(fitting, entries)
    notes = [*_names_of(chosen), *notes, *_casts(state, own), *_fillings(state, own), *left]
    return Fit(_completed(state, own), notes)


def _tensors(loaded: Mapping[Any, Any], nest: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Nesting, key and tensor of every tensor in the file."""
    for key, value in loaded.items():
        if isinstance(value, Tensor):
            yield nest, str(key), value
        elif isinstance(value, Mapping):
            yield from _tensors(value, (*nest, str(key)))


def _parts(key: str) -> tuple[str, ...]:
    """The key's components without wrappers'; an entry that is called like a wrapper itself keeps its name."""
    *path, last = key.split(".")
    return (*(part for part in path if part not in WRAPPERS), last)


def _wanted(own: Mapping[str, Tensor]) -> dict[tuple[str, ...], list[str]]:
    """Every spelling of the model's keys, as components, to the keys."""
    plain = {key: _parts(key) for key in own}
    if len(set(plain.values())) < len(own):  # the model has parts of its own that are called like wrappers
        plain = {key: tuple(key.split(".")) for key in own}
    wanted: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, parts in plain.items():
        wanted[parts].append(key)
    taken = set(wanted)
    for key, parts in plain.items():
        for spelling in _spellings(parts):
            if spelling not in taken:
                wanted[spelling].append(key)
    return wanted


def _spellings(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    joined = "." + ".".join(parts)
    for pair in SPELLINGS:
        for one, other in (pair, pair[::-1]):
            if joined.endswith(f".{one}"):
                yield tuple((joined.removesuffix(one) + other)[1:].split("."))


def _sets(entries: Sequence[Entry], own: Mapping[str, Tensor]) -> list[_Set]:
    """The entries by the prefix that stands before the model's keys, the shortest prefix first.

    Where no prefix has the whole model, the file's keys may lack what all of the model's begin with.
    """
    wanted = _wanted(own)
    tied, needed = _tied(own), _needed(own)
    depth = 0
    while True:
        shortened = {parts[depth:]: keys for parts, keys in wanted.items() if len(parts) > depth}
        sets = _by_prefix(entries, shortened)
        if any(needed <= _filled(one, tied) for one in sets):
            return sets
        heads = {parts[: depth + 1] for parts in wanted}
        if len(heads) != 1 or any(len(parts) <= depth + 1 for parts in wanted):
            return _by_prefix(entries, wanted)
        depth += 1


def _by_prefix(entries: Sequence[Entry], wanted: Mapping[tuple[str, ...], Sequence[str]]) -> list[_Set]:
    sets: dict[tuple[tuple[str, ...], tuple[str, ...]], _Set] = {}
    respelled: list[tuple[_Set, str, str, Tensor]] = []
    for nest, key, tensor in entries:
        plain, raw = _parts(key), tuple(key.split("."))
        for parts in dict.fromkeys((plain, raw)):
            for start in range(len(parts)):
                for name in wanted.get(parts[start:], ()):
                    one = sets.setdefault((nest, parts[:start]), _Set(nest, parts[:start]))
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


def _tied(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Key to all keys of the same memory, itself too."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for key, tensor in own.items():
        groups[_memory(tensor) if tensor.numel() and tensor.untyped_storage().data_ptr() else key].append(key)
    return {key: group for group in groups.values() for key in group}


def _needed(own: Mapping[str, Tensor]) -> set[str]:
    return {key for key in own if key.rpartition(".")[2] != COUNTER}


def _filled(one: _Set, tied: Mapping[str, list[str]]) -> set[str]:
    """The model's keys that a set fills, those tied to them too."""
    return {alias for key in one.found for alias in tied[key]}


def _choose(fitting: list[_Set], weights: WeightSet) -> tuple[_Set, list[str]]:
    averaged = [one for one in fitting if one.averaged]
    plain = [one for one in fitting if not one.averaged]
    if weights != "auto" and not (averaged if weights == "ema" else plain):
        kind = "averaged (EMA)" if weights == "ema" else "plain"
        raise ModelError(
            f"the checkpoint holds no {kind} weights",
            f"what fits the model stands under {_listed([one.name for one in fitting])}",
            "leave weights out to take these",
        )
    among = plain if weights == "plain" else averaged or plain
    exact = [one for one in among if not one.nest and not one.prefix]
    different = exact or [one for i, one in enumerate(among) if not any(_equal(one, other) for other in among[:i])]
    if len(different) > 1:
        names = [f"'{one.name}'" for one in different]
        raise ModelError(
            "several sets of weights in the checkpoint fit the model",
            f"they stand under {_listed(names)} and are not the same",
            "save those that are meant alone: torch.save(model.state_dict(), 'weights.pt')",
        )
    chosen = different[0]
    if chosen.averaged and plain:
        return chosen, [
            f"the averaged weights (EMA) were taken; weights=plain takes the plain ones under '{plain[0].name}'"
        ]
    if chosen.averaged:
        return chosen, ["these are averaged weights (EMA); the file has no others"]
    if averaged:
        return chosen, [f"the plain weights were taken, not the averaged ones (EMA) under '{averaged[0].name}'"]
    return chosen, []


def _equal(one: _Set, other: _Set) -> bool:
    return one.found.keys() == other.found.keys() and all(
        torch.equal(some[0][1], other.found[key][0][1]) for key, some in one.found.items()
    )


def _only(key: str, some: list[tuple[str, Tensor]]) -> Tensor:
    """The tensor of a key; several file keys for it must agree."""
    if any(tensor.shape != some[0][1].shape or not torch.equal(tensor, some[0][1]) for _, tensor in some[1:]):
        raise ModelError(
            f"the checkpoint holds several tensors for '{key}'",
            f"{_listed([name for name, _ in some])} are not the same",
            "save the weights that are meant alone: torch.save(model.state_dict(), 'weights.pt')",
        )
    return some[0][1]


def _completed(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with tied entries filled from each other, and counters that the file lacks from the model.

    Raises:
        ModelError: the file has different tensors for entries that are one weight in the model.
    """
    whole = {}
    for key, aliases in _tied(own).items():
        given = {alias: state[alias] for alias in aliases if alias in state}
        first = next(iter(given.values()), own[key])
        if any(not torch.equal(first, other) for other in given.values()):
            raise ModelError(
                "the checkpoint unties weights that the model shares",
                f"{_listed(list(given))} are one weight in the model, and differ in the file",
                "build the model without the tie, or give the checkpoint of the tied model",
            )
        whole[key] = first
    return whole


# What is said


def _names_of(chosen: _Set) -> list[str]:
    """Nesting, prefixes before every key, and wrappers inside keys."""
    notes = [f"the weights stood under '{nest}'" for nest in chosen.nest]
    keys = [(some[0][0].split("."), name.split(".")) for name, some in chosen.found.items()]
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
    notes += [
        f"'{ending}' is read as this model's spelling of it ({count} entries)" for ending, count in lacking.items()
    ]
    return notes


def _casts(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    pairs = Counter(
        (_dtype(tensor), _dtype(own[key])) for key, tensor in state.items() if tensor.dtype != own[key].dtype
    )
    return [f"{count} tensors were cast from {theirs} to the model's {ours}" for (theirs, ours), count in pairs.items()]


def _fillings(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    tied = _tied(own)
    notes = []
    shared = [key for key in own if key not in state and any(alias in state for alias in tied[key])]
    if shared:
        notes.append(f"{_listed(shared)} is stored once, with the weight that it is tied to")
    counters = [key for key in own if key not in state and key not in shared]
    if counters:
        notes.append(f"the file has no {COUNTER} for {len(counters)} norms, which evaluation does not read")
    return notes


def _left_out(fitting: Sequence[_Set], entries: Sequence[Entry]) -> list[str]:
    """The tensors that no set which fits the model has."""
    taken = {(one.nest, key) for one in fitting for some in one.found.values() for key, _ in some}
    others = [".".join((*nest, key)) for nest, key, _ in entries if (nest, key) not in taken]
    beside = [name for name in others if not _of_optimizer(name)]
    return [f"left out, since the model has no such entry: {_listed(beside)}"] if beside else []


def _of_optimizer(name: str) -> bool:
    return name.startswith(("optimizer", "scheduler", "lr_scheduler", "scaler", "rng", "callbacks", "loops"))


# What does not fit


def _unexpected(chosen: _Set, entries: Sequence[Entry], own: Mapping[str, Tensor]) -> list[str]:
    taken = {key for some in chosen.found.values() for key, _ in some}
    heads = {_parts(name)[0] for name in own if "." in name}
    found = []
    for nest, key, tensor in entries:
        parts = _parts(key)
        inner = parts[len(chosen.prefix) :]
        if nest != chosen.nest or key in taken or parts[: len(chosen.prefix)] != chosen.prefix or len(inner) < 2:
            continue
        known = inner[0] in heads or inner[0].isdigit()
        if known and tensor.is_floating_point() and inner[-1] not in LEFTOVERS:
            found.append(key)
    return found


def _misfit(
    entries: Sequence[Entry],
    sets: Sequence[_Set],
    whole: Sequence[_Set],
    own: Mapping[str, Tensor],
) -> ModelError:
    """The error of the set that comes nearest."""
    nearest = max(whole or sets, key=lambda one: len(one.found), default=_Set((), ()))
    missing = [key for key in own if key in _needed(own) and key not in _filled(nearest, _tied(own))]
    taken = {key for some in nearest.found.values() for key, _ in some}
    unexpected = [key for nest, key, _ in entries if nest == nearest.nest and key not in taken]
    unlike = _unlike(nearest, own)
    return _does_not_fit(
        [("missing", missing), ("unexpected", unexpected if missing else []), ("shapes differ", unlike)]
    )


def _unlike(one: _Set, own: Mapping[str, Tensor]) -> list[str]:
    """The entries of a set that are of another shape, or integers where the model has floats, or the reverse."""
    unlike = []
    for key, some in one.found.items():
        theirs, ours = some[0][1], own[key]
        if theirs.shape != ours.shape:
            unlike.append(f"{key} is {tuple(theirs.shape)} in the file and {tuple(ours.shape)} in the model")
        elif theirs.is_floating_point() != ours.is_floating_point():
            unlike.append(f"{key} is {_dtype(theirs)} in the file and {_dtype(ours)} in the model")
    return unlike


def _does_not_fit(problems: Sequence[tuple[str, Sequence[str]]]) -> ModelError:
    return ModelError(
        "the checkpoint does not fit the model",
        "; ".join(f"{label}: {_listed(keys)}" for label, keys in problems if keys),
        f"give the model's own arguments, {argument('model_kwargs', {'width': 64})} for instance, "
        "or the checkpoint of this architecture",
    )


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
