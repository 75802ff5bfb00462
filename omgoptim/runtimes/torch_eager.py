"""Eager torch engine, in float32, bfloat16, float16 or with int8 dynamic layers."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from omgoptim.runtimes.engine import Engine, Session, SessionSettings
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from torch import nn


def missing(device: str) -> str | None:
    """Return why torch cannot be used on a device, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    from omgoptim.runtimes.torch_session import missing_device

    return missing_device(device)


def open_session(module: nn.Module, signature: Signature, settings: SessionSettings) -> Session:
    """Open a module as it is, in eager mode."""
    from omgoptim.runtimes.torch_session import open_module

    return open_module(module, module, signature, settings)


ENGINE = Engine("torch_eager", "module", missing, open_session)
