"""Weights from a checkpoint: .safetensors, and .pt/.pth state dicts without running anything that a pickle could hold.

Several sets of weights that fit a model are an error, except that averaged weights (EMA, SWA) take precedence over the
plain ones; `weights` selects between them and the notes report it.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from omgoptim.errors import ModelError, argument
from omgoptim.models.checkpoint_keys import (
    Entry,
    EntrySet,
    cast_notes,
    entry_sets,
    filled_keys,
    filling_notes,
    iterate_tensors,
    left_out_notes,
    listed,
    mismatched_entries,
    nan_notes,
    needed_keys,
    prefix_notes,
    tied_keys,
    unexpected_keys,
)

WeightSet = Literal["auto", "ema", "plain"]


PLAIN_CLASSES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.datetime",
    *(f"pathlib.{part}{name}" for part in ("", "_local.") for name in ("Path", "PosixPath", "WindowsPath")),
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    *(f"numpy.{name}" for name in ("ndarray", "float64", "float32", "int64")),
)
"""Classes of what training scripts store beside the weights: arguments, paths, best scores. They are read as
`_Omitted`, so that nothing of theirs runs."""

MAX_DICTS = 100_000
"""Nested dicts that are read. Chosen: an optimizer's state has one for each parameter."""

ARRAY_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
"""numpy's names of the dtypes whose arrays are read as tensors."""


class _Omitted:
    """Placeholder for an object beside the weights."""

    def __new__(cls, *_: object) -> _Omitted:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        """Take and drop what the object is made from."""

    def __setstate__(self, _: object) -> None:
        """Drop the object's state."""


class _ArrayDtype(_Omitted):
    """Placeholder for a pickled numpy dtype: its name and byte order."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name, self.order = name, ""

    def __setstate__(self, state: object) -> None:
        """Keep the byte order."""
        self.order = ">" if isinstance(state, tuple) and state[1:2] == (">",) else "<"


class _Array(_Omitted):
    """Placeholder for a pickled numpy array, so that numpy does not unpickle untrusted content."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        """Keep the state, which `tensor` checks."""
        self.state = state

    def tensor(self) -> Tensor | None:
        """Return the array as a tensor; None if it is no whole array of numbers."""
        import numpy as np

        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _ArrayDtype) or dtype.name not in ARRAY_DTYPES or not isinstance(raw, bytes):
            return None
        kind = np.dtype(f"{dtype.order}{dtype.name}")
        sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or math.prod(shape) * kind.itemsize != len(raw):
            return None
        values = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran is True else "C")
        return torch.from_numpy(values.astype(kind.newbyteorder("="), order="C"))


STORED_CLASSES: tuple[tuple[type, str], ...] = (
    *((_Omitted, name) for name in PLAIN_CLASSES),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (_ArrayDtype, "numpy.dtype"),
)
"""Placeholder of each class that a checkpoint may name."""


def load_checkpoint(module: nn.Module, path: Path, weights: WeightSet = "auto") -> list[str]:
    """Load the weights in `path` into `module`: every entry of its state dict, or none.

    Args:
        module: changed in place.
        path: `.safetensors`, or a file of tensors that `torch.load(weights_only=True)` reads.
        weights: ema, plain, or auto: averaged weights (EMA) if the file has any.

    Returns:
        Notes on prefixes, casts and ignored entries.

    Raises:
        ModelError: the file cannot be read safely, does not fit (with the keys that do not), or is ambiguous.
    """
    model_state = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    try:
        matched = match_keys(read_tensors(path), model_state, weights)
    except ModelError as error:
        what = error.what.replace("the checkpoint", f"checkpoint {path.name}", 1)
        raise ModelError(what, error.why, error.fix) from error
    module.load_state_dict(matched.state, strict=False)  # complete; only a module's own extra state may be missing
    return [f"checkpoint {path.name}: {note}" for note in matched.notes]


def read_tensors(path: Path) -> Mapping[str, Any]:
    """Read the mapping that the file holds.

    Raises:
        ModelError: an unknown ending, a damaged file, or a pickle that holds more than tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: Mapping[str, Any] = load_file(path)
            return tensors
        except SafetensorError as error:
            raise _unreadable(path, str(error)) from error
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ModelError(f"checkpoint {path.name} has an unknown format", "known: .safetensors, .pt, .pth, .bin, .ckpt")
    try:
        with torch.serialization.safe_globals(list(STORED_CLASSES)):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # what torch says of bytes that are none of its pickles
            raise _unreadable(path, "torch.save did not write it") from error
        raise ModelError(
            f"checkpoint {path.name} contains more than tensors, and opening it would run code",
            "it is a pickled module, or contains pickled objects beside the weights",
            "save only the weights: torch.save(model.state_dict(), 'weights.pt'), and give the class as the model",
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError) as error:
        lines = str(error).splitlines()
        if lines and "TorchScript" in lines[0]:
            raise _unreadable(path, "it is a TorchScript archive, not a state dict") from error
        first = lines[0].partition(". ")[0] if lines else "it is empty or truncated"
        raise _unreadable(path, first) from error  # torch's advice to load without weights_only is left out
    if not isinstance(loaded, Mapping):
        raise ModelError(f"checkpoint {path.name} contains a {type(loaded).__name__}", "a state dict is needed")
    try:
        return _with_tensors(loaded, itertools.count())
    except RecursionError as error:  # a dict within itself, for instance
        raise _unreadable(path, "its dicts are nested too deep, or too many") from error


def _with_tensors(loaded: Mapping[Any, Any], visited: Iterator[int]) -> dict[Any, Any]:
    """Return a mapping whose numpy arrays of numbers are tensors; mappings may be nested.

    Raises:
        RecursionError: too deep, or more than `MAX_DICTS`: each that names the next one twice doubles their number.
    """
    if next(visited) > MAX_DICTS:
        raise RecursionError
    values = {}
    for key, value in loaded.items():
        array = value.tensor() if isinstance(value, _Array) else None
        values[key] = _with_tensors(value, visited) if isinstance(value, Mapping) else value if array is None else array
    return values


def _unreadable(path: Path, why: str) -> ModelError:
    return ModelError(
        f"checkpoint {path.name} cannot be read", why, "save it again: torch.save(model.state_dict(), 'weights.pt')"
    )


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """State dict of a model from a checkpoint."""

    state: dict[str, Tensor]
    """Every entry of the model's state dict that the file or a tied entry fills."""
    notes: list[str]
    """Notes on prefixes, casts, filled and ignored entries."""


def match_keys(loaded: Mapping[Any, Any], model_state: Mapping[str, Tensor], weights: WeightSet = "auto") -> KeyMatch:
    """Match a checkpoint's tensors with a model's.

    Args:
        loaded: what the file holds; mappings may be nested.
        model_state: the model's state dict, tensors only; entries that share memory are one weight.
        weights: which of a file's averaged and plain weights are meant; auto: averaged where there are any.

    Raises:
        ModelError: entries are missing or have other shapes, the file has weights for layers that the model lacks,
            several sets of weights fit, or there is none of the kind that `weights` asks for.
    """
    entries = list(iterate_tensors(loaded))
    tied, needed = tied_keys(model_state), needed_keys(model_state)
    sets = entry_sets(entries, model_state)
    complete = [entry_set for entry_set in sets if needed <= filled_keys(entry_set, tied)]
    fitting = [entry_set for entry_set in complete if not mismatched_entries(entry_set, model_state)]
    if not fitting:
        raise _misfit(entries, sets, complete, model_state)
    chosen, notes = _choose(fitting, weights)
    state = {key: _agreed_tensor(key, file_entries) for key, file_entries in chosen.found.items()}
    unknown = unexpected_keys(chosen, entries, model_state)
    if unknown:  # another architecture
        raise _does_not_fit([("unexpected", unknown)])
    remarks = [*nan_notes(state), *left_out_notes(fitting, entries)]
    notes = [
        *prefix_notes(chosen),
        *notes,
        *cast_notes(state, model_state),
        *filling_notes(state, model_state),
        *remarks,
    ]
    return KeyMatch(_completed(state, model_state), notes)


def _choose(fitting: list[EntrySet], weights: WeightSet) -> tuple[EntrySet, list[str]]:
    averaged = [entry_set for entry_set in fitting if entry_set.averaged]
    plain = [entry_set for entry_set in fitting if not entry_set.averaged]
    if weights != "auto" and not (averaged if weights == "ema" else plain):
        kind = "averaged (EMA)" if weights == "ema" else "plain"
        raise ModelError(
            f"the checkpoint has no {kind} weights",
            f"the weights that fit the model are under {listed([entry_set.name for entry_set in fitting])}",
            "omit the argument weights to use these",
        )
    among = plain if weights == "plain" else averaged or plain
    exact = [entry_set for entry_set in among if not entry_set.nest and not entry_set.prefix]
    different = exact or [
        entry_set for i, entry_set in enumerate(among) if not any(_equal(entry_set, other) for other in among[:i])
    ]
    if len(different) > 1:
        names = [f"'{entry_set.name}'" for entry_set in different]
        raise ModelError(
            "several sets of weights in the checkpoint fit the model",
            f"they are under {listed(names)} and differ",
            "save only the intended weights: torch.save(model.state_dict(), 'weights.pt')",
        )
    chosen = different[0]
    if chosen.averaged and plain:
        return chosen, [
            f"the averaged weights (EMA) were used; weights=plain uses the plain ones under '{plain[0].name}'"
        ]
    if chosen.averaged:
        return chosen, ["the weights are averaged (EMA); the file has no others"]
    if averaged:
        return chosen, [f"the plain weights were used, not the averaged ones (EMA) under '{averaged[0].name}'"]
    return chosen, []


def _equal(first: EntrySet, second: EntrySet) -> bool:
    return first.found.keys() == second.found.keys() and all(
        torch.equal(file_entries[0][1], second.found[key][0][1]) for key, file_entries in first.found.items()
    )


def _agreed_tensor(key: str, file_entries: list[tuple[str, Tensor]]) -> Tensor:
    """Return the tensor of a key; several file keys for it must agree."""
    if any(
        tensor.shape != file_entries[0][1].shape or not torch.equal(tensor, file_entries[0][1])
        for _, tensor in file_entries[1:]
    ):
        raise ModelError(
            f"the checkpoint has several tensors for '{key}'",
            f"{listed([name for name, _ in file_entries])} differ",
            "save only the intended weights: torch.save(model.state_dict(), 'weights.pt')",
        )
    return file_entries[0][1]


def _completed(state: dict[str, Tensor], model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill tied entries from each other, and counters that the file lacks from the model.

    Raises:
        ModelError: the file has different tensors for entries that are one weight in the model.
    """
    completed = {}
    for key, aliases in tied_keys(model_state).items():
        tied = {alias: state[alias] for alias in aliases if alias in state}
        first = next(iter(tied.values()), model_state[key])
        if any(other is not first and not torch.equal(first, other) for other in tied.values()):  # NaN is unequal
            raise ModelError(
                "weights that are tied in the model differ in the checkpoint",
                f"tied in the model: {listed(list(tied))}",
                "build the model without tied weights, or give a checkpoint of the tied model",
            )
        completed[key] = first
    return completed


def _misfit(
    entries: Sequence[Entry], sets: Sequence[EntrySet], complete: Sequence[EntrySet], model_state: Mapping[str, Tensor]
) -> ModelError:
    """Return the error for the set that comes nearest."""
    nearest = max(complete or sets, key=lambda entry_set: len(entry_set.found), default=EntrySet((), ()))
    missing = [
        key
        for key in model_state
        if key in needed_keys(model_state) and key not in filled_keys(nearest, tied_keys(model_state))
    ]
    used = {key for file_entries in nearest.found.values() for key, _ in file_entries}
    unexpected = [key for nest, key, _ in entries if nest == nearest.nest and key not in used]
    mismatched = mismatched_entries(nearest, model_state)
    return _does_not_fit(
        [("missing", missing), ("unexpected", unexpected if missing else []), ("unlike the model's", mismatched)]
    )


def _does_not_fit(problems: Sequence[tuple[str, Sequence[str]]]) -> ModelError:
    return ModelError(
        "the checkpoint does not fit the model",
        "; ".join(f"{label}: {listed(keys)}" for label, keys in problems if keys),
        f"give the arguments that the model was trained with, for instance {argument('model_kwargs', {'width': 64})}, "
        "or the checkpoint of this architecture",
    )
