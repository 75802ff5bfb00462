"""Python objects of the caller in place of a request's named sources: module, data, metric, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.errors import RequestError
from omgoptim.models.data import DataSource
from omgoptim.models.forward import NamedBatch
from omgoptim.models.recipe import Recipe
from omgoptim.models.samples import as_tensors
from omgoptim.runtimes.signature import Signature


@dataclass(frozen=True, slots=True)
class Live:
    """Python objects of the caller, in place of named sources."""

    module: nn.Module | None = None
    data: Callable[..., Any] | None = None
    metric: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    student: nn.Module | None = None
    space: Callable[[Any], Any] | None = None
    resplit: Callable[[DataSource], DataSource] | None = None
    """Replaces the data of a step of another run, whose evaluation samples are selection samples of that run."""
    notes: tuple[str, ...] = ()
    """Notes on the module, for example that it was in training mode."""


def recipe_of_live(
    module: nn.Module, signature: Signature, example: NamedBatch, path: Path
) -> tuple[Recipe, str | None]:
    """Export a live module, which a fresh process cannot build, as its recipe.

    Args:
        module: the caller's module.
        signature: its inputs and outputs.
        example: one batch to export it with.
        path: file of the exported program.

    Returns:
        The recipe, and the reason for a fixed batch of 1, if so.
    """
    from omgoptim.runtimes.export import export_pt2

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = as_tensors(example, signature.dtypes)
    fixed = export_pt2(module, tensors, signature, path, or_at_one=True)
    return Recipe("pt2", str(path)), fixed


def by_split(data: Any) -> Callable[..., Iterable[Any]]:
    """Convert data to a callable taking `split`."""
    if callable(data):
        loaded: Callable[..., Iterable[Any]] = data
        return loaded
    if isinstance(data, dict) and "eval" in data:
        splits: dict[str, Iterable[Any]] = data
        return lambda split: splits.get(split, splits.get("calibration", splits.get("train", [])))
    raise RequestError(
        "the data is neither a source, a callable nor a mapping of splits",
        f"received a {type(data).__name__}",
        "give {'calibration': loader, 'eval': loader}; evaluation data is never used for selection",
    )
