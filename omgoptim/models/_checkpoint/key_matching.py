"""Matching of a checkpoint's tensors with the entries of a model's state dict.

A file's keys are matched by the longest common suffix: the rest is a prefix, and one prefix must hold for the whole
model. Components of wrappers (`module.`, `_orig_mod.`) are dropped, and parametrized and older spellings of a key are
recognized. Several sets of weights that fit are an error, except that averaged weights (EMA, SWA) take precedence over
the plain ones; `weights` selects between them and the notes report it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from omgoptim.errors import ModelError, argument
from omgoptim.models._checkpoint.key_prefixes import (
    COUNTER,
    WRAPPERS,
    Entry,
    EntrySet,
    entry_sets,
    filled_keys,
    iterate_tensors,
    key_parts,
    needed_keys,
    tied_keys,
)

WeightSet = Literal["auto", "ema", "plain"]

LEFTOVERS = frozenset({"total_ops", "total_params", "masked_bias", "inv_freq"})
"""Floating entries that are no weights: thop's counters, and buffers that transformers no longer saves."""

NAMED = 5
"""Number of keys that an error names before "and N more"."""


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """State dict of a model from a checkpoint."""

    state: dict[str, Tensor]
    """Every entry of the model's state dict that the file or a tied entry fills."""
    notes: list[str]
    """Notes on prefixes, casts, filled and ignored entries."""


def match_keys(loaded: Mapping[Any, Any], own: Mapping[str, Tensor], weights: WeightSet = "auto") -> KeyMatch:
    """Match a checkpoint's tensors with a model's.

    Args:
        loaded: what the file holds; mappings may be nested.
        own: the model's state dict, tensors only; entries that share memory are one weight.
        weights: which of a file's averaged and plain weights are meant; auto: averaged where there are any.

    Raises:
        ModelError: entries are missing or have other shapes, the file has weights for layers that the model lacks,
            several sets of weights fit, or there is none of the kind that `weights` asks for.
    """
    entries = list(iterate_tensors(loaded))
    tied, needed = tied_keys(own), needed_keys(own)
    sets = entry_sets(entries, own)
    whole = [one for one in sets if needed <= filled_keys(one, tied)]
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
    return KeyMatch(_completed(state, own), notes)


def _choose(fitting: list[EntrySet], weights: WeightSet) -> tuple[EntrySet, list[str]]:
    averaged = [one for one in fitting if one.averaged]
    plain = [one for one in fitting if not one.averaged]
    if weights != "auto" and not (averaged if weights == "ema" else plain):
        kind = "averaged (EMA)" if weights == "ema" else "plain"
        raise ModelError(
            f"the checkpoint holds no {kind} weights",
            f"the weights that fit the model are under {_listed([one.name for one in fitting])}",
            "leave weights out to take these",
        )
    among = plain if weights == "plain" else averaged or plain
    exact = [one for one in among if not one.nest and not one.prefix]
    different = exact or [one for i, one in enumerate(among) if not any(_equal(one, other) for other in among[:i])]
    if len(different) > 1:
        names = [f"'{one.name}'" for one in different]
        raise ModelError(
            "several sets of weights in the checkpoint fit the model",
            f"they are under {_listed(names)} and are not the same",
            "save only the intended weights: torch.save(model.state_dict(), 'weights.pt')",
        )
    chosen = different[0]
    if chosen.averaged and plain:
        return chosen, [
            f"the averaged weights (EMA) were used; weights=plain takes the plain ones under '{plain[0].name}'"
        ]
    if chosen.averaged:
        return chosen, ["these are averaged weights (EMA); the file has no others"]
    if averaged:
        return chosen, [f"the plain weights were used, not the averaged ones (EMA) under '{averaged[0].name}'"]
    return chosen, []


def _equal(one: EntrySet, other: EntrySet) -> bool:
    return one.found.keys() == other.found.keys() and all(
        torch.equal(some[0][1], other.found[key][0][1]) for key, some in one.found.items()
    )


def _only(key: str, some: list[tuple[str, Tensor]]) -> Tensor:
    """Return the tensor of a key; several file keys for it must agree."""
    if any(tensor.shape != some[0][1].shape or not torch.equal(tensor, some[0][1]) for _, tensor in some[1:]):
        raise ModelError(
            f"the checkpoint holds several tensors for '{key}'",
            f"{_listed([name for name, _ in some])} are not the same",
            "save only the intended weights: torch.save(model.state_dict(), 'weights.pt')",
        )
    return some[0][1]


def _completed(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill tied entries from each other, and counters that the file lacks from the model.

    Raises:
        ModelError: the file has different tensors for entries that are one weight in the model.
    """
    whole = {}
    for key, aliases in tied_keys(own).items():
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


def _names_of(chosen: EntrySet) -> list[str]:
    """Describe the nesting, the prefixes before every key, and the wrappers inside keys."""
    notes = [f"the weights were under '{nest}'" for nest in chosen.nest]
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
    tied = tied_keys(own)
    notes = []
    shared = [key for key in own if key not in state and any(alias in state for alias in tied[key])]
    if shared:
        notes.append(f"{_listed(shared)} is stored once, with the weight that it is tied to")
    counters = [key for key in own if key not in state and key not in shared]
    if counters:
        notes.append(f"the file has no {COUNTER} for {len(counters)} norms, which evaluation does not read")
    return notes


def _left_out(fitting: Sequence[EntrySet], entries: Sequence[Entry]) -> list[str]:
    """Return the tensors that are in no set which fits the model."""
    used = {(one.nest, key) for one in fitting for some in one.found.values() for key, _ in some}
    others = [".".join((*nest, key)) for nest, key, _ in entries if (nest, key) not in used]
    beside = [name for name in others if not _of_optimizer(name)]
    return [f"left out, since the model has no such entry: {_listed(beside)}"] if beside else []


def _of_optimizer(name: str) -> bool:
    return name.startswith(("optimizer", "scheduler", "lr_scheduler", "scaler", "rng", "callbacks", "loops"))


# What does not fit


def _unexpected(chosen: EntrySet, entries: Sequence[Entry], own: Mapping[str, Tensor]) -> list[str]:
    used = {key for some in chosen.found.values() for key, _ in some}
    heads = {key_parts(name)[0] for name in own if "." in name}
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


def _misfit(
    entries: Sequence[Entry],
    sets: Sequence[EntrySet],
    whole: Sequence[EntrySet],
    own: Mapping[str, Tensor],
) -> ModelError:
    """Return the error for the set that comes nearest."""
    nearest = max(whole or sets, key=lambda one: len(one.found), default=EntrySet((), ()))
    missing = [key for key in own if key in needed_keys(own) and key not in filled_keys(nearest, tied_keys(own))]
    used = {key for some in nearest.found.values() for key, _ in some}
    unexpected = [key for nest, key, _ in entries if nest == nearest.nest and key not in used]
    unlike = _unlike(nearest, own)
    return _does_not_fit(
        [("missing", missing), ("unexpected", unexpected if missing else []), ("shapes differ", unlike)]
    )


def _unlike(one: EntrySet, own: Mapping[str, Tensor]) -> list[str]:
    """Return the entries of a set whose shape differs, or that are integer on one side and floating on the other."""
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
