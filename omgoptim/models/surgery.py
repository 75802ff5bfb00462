"""What was changed in a module after its own code built it, as plain data: how an artifact of changed shape reopens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Surgery:
    """The difference between a module as its recipe builds it and as it is saved."""

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module path to the numeric attributes that changed: `{"conv1": {"out_channels": 12}}`."""
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Module path to the block of `omgoptim.blocks` that stands there now: `{"kind": "LowRankLinear", …}`."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Name of a parameter or buffer to its new shape."""

    def to_json(self) -> dict[str, Any]:
        return {"attributes": self.attributes, "blocks": self.blocks, "shapes": self.shapes}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Surgery:
        return Surgery(dict(record["attributes"]), dict(record["blocks"]), dict(record["shapes"]))


def record(fresh: nn.Module, changed: nn.Module) -> Surgery | None:
    """What turns `fresh` into the shape of `changed`; None if nothing does."""
    raise NotImplementedError


def operate(module: nn.Module, surgery: Surgery) -> None:
    """Give a freshly built module the shape that was recorded; its weights are loaded afterwards."""
    raise NotImplementedError
