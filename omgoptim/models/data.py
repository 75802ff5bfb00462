"""The user's data as three splits of batches: from a callable or a file of arrays, or random inputs if there is none.

The arrays of a file, `.npz` or `.safetensors`, are read only after their headers were checked.
"""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from omgoptim.errors import DataError, RequestError
from omgoptim.hardware import refuse_beyond_memory
from omgoptim.models.raw_batch import TARGET_KEYS, Collation, RawBatch, split_target, take_samples
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.security.user_code import call_user, load_callable
from omgoptim.requests import InputSpec

if TYPE_CHECKING:
    from omgoptim.models.recipe import Recipe

Split = Literal["train", "calibration", "eval"]


@dataclass(frozen=True, slots=True)
class DataSource:
    """Source of batches. `real` is False for random inputs, whose quality is not accuracy."""

    batches: Callable[[Split], Iterator[RawBatch]]
    """The batches of a split, in its own order."""
    epoch: Callable[[int], Iterator[RawBatch]]
    """`epoch(batch)`: one pass over the train split in an order drawn from torch's random state; `batch` is the size
    unless the data has its own. Loaded once if the user's data can be iterated again."""
    real: bool
    notes: list[str] = field(default_factory=list)

    def evaluation(self, samples: int) -> list[RawBatch]:
        """Collect batches of the eval split until `samples` samples are reached.

        Raises:
            DataError: there are none.
        """
        found = take_samples(self.batches("eval"), samples)
        if not found:
            what, why = "the evaluation data is empty", "the data yielded no batch for split='eval'"
            raise DataError(what, why, "give at least one sample")
        return found


def open_data(
    spec: str, policy: PathPolicy, batch: int, limit_s: float, seed: int, collation: Collation | None = None
) -> DataSource:
    """Open the data that `spec` names: `file.py:callable`, `.npz` or `.safetensors`.

    Args:
        spec: the source, as the request's `data` names it.
        policy: the files and modules whose code may run.
        batch: samples in a batch where the data yields samples.
        limit_s: seconds that a call of the user's code may take.
        seed: of the order in which the arrays of a file are split.
        collation: properties of the model, for data that yields samples.

    Raises:
        DataError: no such file or callable, or it gives nothing usable.
        UserCodeError: the callable failed.
    """
    if spec.endswith((".npz", ".safetensors")):
        return _from_arrays(policy.file(spec, "data"), batch, seed)
    load = load_callable(spec, policy, "data", limit_s)
    return from_callable(load, batch, limit_s, collation)


def adjacent_loader(recipe: Recipe | None, policy: PathPolicy, limit_s: float) -> tuple[str, Callable[..., Any]] | None:
    """Find `load(split)` in the file or module of the model's callable; return it with its name, or None.

    Raises:
        UserCodeError, SetupError: importing that file failed.
    """
    if recipe is None or recipe.kind != "callable":
        return None
    name = f"{recipe.spec.rpartition(':')[0]}:load"
    try:
        load = load_callable(name, policy, "data", limit_s)
    except (DataError, RequestError):  # there is none, or only one that was imported there
        return None
    takes_split = callable(load) and "split" in inspect.signature(load).parameters
    return (name, load) if takes_split else None


def from_callable(
    load: Callable[..., Any], batch: int, limit_s: float, collation: Collation | None = None
) -> DataSource:
    """Read data from a callable that takes `split`, or one argument of any name.

    Args:
        load: the user's callable.
        batch: samples in a batch where the data yields samples.
        limit_s: seconds that a call of it may take.
        collation: properties of the model, for data that yields samples.
    """
    if not callable(load):
        raise DataError(f"the data is a {type(load).__name__}", "a callable with the argument split is needed")
    called = _by_split(load)
    collator = collation or Collation()

    def read(loaded: Any, split: Split, size: int, shuffled: bool) -> Iterator[RawBatch]:
        iterator = call_user(f"iterating over the {split} data", limit_s, as_batches, loaded, size, shuffled, collator)
        while (raw := call_user(f"reading the {split} data", limit_s, next, iterator, None)) is not None:
            yield raw

    def batches(split: Split) -> Iterator[RawBatch]:
        yield from read(call_user(f"loading the {split} data", limit_s, called, split), split, batch, False)

    cached: list[Any] = []

    def epoch(size: int) -> Iterator[RawBatch]:
        loaded = cached[0] if cached else call_user("loading the train data", limit_s, called, "train")
        if not cached and not isinstance(loaded, Iterator):  # an iterator is used up by one pass
            cached.append(loaded)
        yield from read(loaded, "train", size, True)

    return DataSource(batches, epoch, real=True, notes=collator.notes)


def _by_split(load: Callable[..., Any]) -> Callable[[str], Any]:
    """Wrap the user's callable as a function of the split, by the keyword `split` or by its only argument.

    Raises:
        DataError: it takes neither.
    """
    parameters = inspect.signature(load).parameters
    if "split" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return lambda split: load(split=split)
    by_place = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if len(needed) == 1 == len(by_place[:1]) and needed[0] is by_place[0]:
        return lambda split: load(split)
    raise DataError(
        "the data callable has no argument 'split'",
        f"its arguments are ({', '.join(parameters)})",
        "define it as def load(split): …, where split is 'train', 'calibration' or 'eval'",
    )


def as_batches(
    loaded: Any, batch: int, shuffled: bool = False, collation: Collation | None = None
) -> Iterator[RawBatch]:
    """Iterate over the batches of a DataLoader, a Dataset or list of samples (collated here), or any iterable.

    Args:
        loaded: what the user's callable returned for a split.
        batch: samples in a batch of a Dataset.
        shuffled: whether a Dataset's samples come in random order; anything else has an order of its own.
        collation: properties of the model.
    """
    collator = collation or Collation()
    if isinstance(loaded, Dataset):
        return collator.batches(loaded, batch, shuffled and not isinstance(loaded, IterableDataset))
    is_one_batch = isinstance(loaded, tuple) and all(isinstance(item, (torch.Tensor, np.ndarray)) for item in loaded)
    if (
        is_one_batch
        or not isinstance(loaded, Iterable)
        or isinstance(loaded, (torch.Tensor, np.ndarray, Mapping, str, bytes))
    ):
        raise DataError(
            f"the data callable returned a {type(loaded).__name__}{' of tensors' if is_one_batch else ''}",
            "a Dataset, a DataLoader or an iterable of batches is needed",
            "return [(inputs, target)] for one batch, or torch.utils.data.TensorDataset(inputs, target)",
        )
    if collator.are_samples(loaded):
        collator.note("the data's list contains samples without a batch dimension; they were collated into batches")
        return collator.batches(loaded, batch, shuffled)
    return map(split_target, loaded)


def random_data(specs: Sequence[str], module: nn.Module | None, count: int, seed: int) -> DataSource:
    """Generate random batches. Token ids stay below the smallest embedding table; masks are ones."""
    inputs = [InputSpec.parse(text) for text in specs]
    tables = [layer.num_embeddings for layer in module.modules() if isinstance(layer, nn.Embedding)] if module else []
    top = min(tables) if tables else 10

    def draw(spec: InputSpec, generator: torch.Generator, samples: int) -> torch.Tensor:
        shape = (samples, *spec.shape[1:])
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if "mask" in (spec.name or ""):
            return torch.ones(shape, dtype=dtype)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        high = 2 if "type" in (spec.name or "") or dtype is torch.bool else top
        return torch.randint(0, high, shape, generator=generator).to(dtype)

    def batches(split: Split) -> Iterator[RawBatch]:
        offset = ("train", "calibration", "eval").index(split)
        generator = torch.Generator().manual_seed(seed * 3 + offset)
        for _ in range(count):
            inputs_drawn = [draw(spec, generator, 8) for spec in inputs]
            named = all(spec.name for spec in inputs)
            yield RawBatch(
                {str(s.name): t for s, t in zip(inputs, inputs_drawn, strict=True)} if named else tuple(inputs_drawn)
            )

    note = "no data was given: inputs are random"
    return DataSource(batches, lambda _size: batches("train"), real=False, notes=[note])


def _from_arrays(path: Path, batch: int, seed: int) -> DataSource:
    arrays = read_arrays(path)
    if not arrays:
        raise DataError(f"data {path.name} contains no array")
    suffixed = {
        name: name.rpartition("_")[::2] for name in arrays if name.endswith(("_train", "_calibration", "_eval"))
    }
    notes = []
    if suffixed:
        by_split: dict[str, dict[str, NDArray[Any]]] = {}
        for name, (base, split) in suffixed.items():
            by_split.setdefault(split, {})[base] = arrays[name]
        if "eval" not in by_split:
            raise DataError(
                f"{path.name} has arrays per split but none that ends in _eval", f"it has {', '.join(arrays)}"
            )
        by_split.setdefault("calibration", by_split.get("train", {}))
        for split, named in by_split.items():
            _same_length(f"{path.name}, split {split},", named)
    else:
        _same_length(path.name, arrays)
        count = len(next(iter(arrays.values())))
        order = np.random.default_rng(seed).permutation(count)
        cutoff = max(1, min(512, count // 4))
        calibration, evaluation = order[:cutoff], order[cutoff:]
        by_split = {
            "calibration": {name: array[calibration] for name, array in arrays.items()},
            "eval": {name: array[evaluation] for name, array in arrays.items()},
        }
        notes.append(f"{path.name} has no splits: calibration uses {cutoff} of {count} samples, evaluation the others")
    by_split.setdefault("train", by_split["calibration"])

    def rows(split: Split, size: int, shuffled: bool) -> Iterator[RawBatch]:
        chosen = by_split[split]
        target = next((key for key in TARGET_KEYS if key in chosen), None)
        names = [name for name in chosen if name != target]
        count = len(next(iter(chosen.values()), ()))
        order = torch.randperm(count).numpy() if shuffled else np.arange(count)
        for start in range(0, count, size):
            picked = order[start : start + size]
            part = {name: torch.from_numpy(chosen[name][picked]) for name in names}
            inputs = next(iter(part.values())) if len(names) == 1 else part
            yield RawBatch(inputs, chosen[target][picked] if target else None)

    return DataSource(
        lambda split: rows(split, batch, False), lambda size: rows("train", size, True), real=True, notes=notes
    )


def _same_length(where: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise DataError(f"the arrays of data {where} are empty or of different lengths", f"lengths: {lengths}")


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a file by name; bfloat16 as float32.

    Raises:
        DataError: it is damaged, holds Python objects, claims more than its entries hold, or does not fit into memory.
    """
    if path.suffix == ".npz":
        try:
            refuse_beyond_memory(_claimed_bytes(path), f"reading data {path.name}", kind=DataError)
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"data {path.name} cannot be read", str(error)) from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        refuse_beyond_memory(path.stat().st_size, f"reading data {path.name}", kind=DataError)
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"data {path.name} cannot be read", str(error)) from error
    return {name: (t.float() if t.dtype is torch.bfloat16 else t).numpy() for name, t in tensors.items()}


def _claimed_bytes(path: Path) -> int:
    """Return the bytes of all arrays of an .npz file, as the headers of its entries declare them.

    Raises:
        DataError: an entry is not an array, holds objects, or is shorter than its header says.
    """
    total = 0
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            name = entry.filename.removesuffix(".npy")
            if dtype.hasobject:
                raise DataError(
                    f"array '{name}' of {path.name} contains Python objects",
                    "they are pickled, and reading them would run code",
                    "save arrays of numbers: np.savez('data.npz', x=np.asarray(rows, dtype=np.float32))",
                )
            size = prod(shape) * dtype.itemsize
            if size > entry.file_size:
                raise DataError(
                    f"array '{name}' of {path.name} does not match its header",
                    f"shape {shape} of {dtype} needs {size:,} bytes, but the entry has {entry.file_size:,}",
                    "save the file again",
                )
            total += size
    return total
