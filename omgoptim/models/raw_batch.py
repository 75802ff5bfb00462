"""Batches in the user's form, and separation of their targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TARGET_KEYS = ("labels", "label", "target", "targets", "y")
"""Keys under which data sets yield their targets, in order of preference."""


@dataclass(frozen=True, slots=True)
class RawBatch:
    """One batch in the user's form: inputs of any kind, target or None."""

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
