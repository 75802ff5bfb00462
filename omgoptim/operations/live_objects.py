"""What a caller in Python gives in place of what a request can only name: modules, data, a metric, a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.errors import RequestError
from omgoptim.models.data import DataSource
from omgoptim.models.forward import NamedBatch
from omgoptim.models.samples import as_tensors
from omgoptim.models.source import Recipe
from omgoptim.runtimes.signature import Signature


@dataclass(frozen=True, slots=True)
class Live:
    """Objects of the caller's process, in place of what a request can only name."""

    module: nn.Module | None = None
    data: Callable[..., Any] | None = None
    metric: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    student: nn.Module | None = None
    resplit: Callable[[DataSource], DataSource] | None = None
    """What a step of a longer run does with the data: its evaluation samples are selection samples of that run."""
    notes: tuple[str, ...] = ()
    """What to say of the module, such as that it came in training mode."""


def recipe_of_live(
    module: nn.Module, signature: Signature, example: NamedBatch, path: Path
) -> tuple[Recipe, str | None]:
    """A live module has no source that a fresh process could build it from: it travels as an exported program.

    Args:
        path: where the program is written.

    Returns:
        The recipe; and why the program takes a batch of 1 only, where it does.
    """
    from omgoptim.runtimes.export import export_pt2

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = as_tensors(example, signature.dtypes)
    fixed = export_pt2(module, tensors, signature, path, or_at_one=True)
    return Recipe("pt2", str(path)), fixed


def by_split(data: Any) -> Callable[..., Iterable[Any]]:
    """The data as a callable taking `split`."""
    if callable(data):
        loaded: Callable[..., Iterable[Any]] = data
        return loaded
    if isinstance(data, dict) and "eval" in data:
        splits: dict[str, Iterable[Any]] = data
        return lambda split: splits.get(split, splits.get("calibration", splits.get("train", [])))
    raise RequestError(
        "the data is neither a source, a callable nor a mapping of splits",
        f"received a {type(data).__name__}",
        "give {'calibration': loader, 'eval': loader}: choices are never made on evaluation data",
    )
