"""Markers that say how the MCP server lists an argument, in the annotation of its field.

    symmetric: Annotated[bool, RARE] = False
    checkpoint: Annotated[str | None, Short("Weights: .safetensors, or .pt/.pth state dict.")] = None

A tool list is paid for in every conversation: a field's description is its text there unless `Short` gives another,
and a `RARE` argument is only named, in the object `options`. `omgoptim VERB --help` has the full descriptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class Short:
    """Text of an argument in the tool list, in place of its description; empty where its name says it."""

    text: str


@dataclass(frozen=True, slots=True)
class Rare:
    """Marker of a rarely needed argument: the tool takes it in `options`."""


RARE: Final = Rare()


def is_rare(field: FieldInfo) -> bool:
    """Return whether the tool takes an argument in `options`."""
    return RARE in field.metadata


def short_text(field: FieldInfo) -> str:
    """Return the text of an argument in the tool list."""
    marker = next((one for one in field.metadata if isinstance(one, Short)), None)
    return field.description or "" if marker is None else marker.text
