"""torch.compile engine (Inductor): fused kernels, compiled in every new process.

Needs a C++ compiler on a CPU. The compiled code cannot be shipped: the artifact is the module, compiled where it opens.
"""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from omgoptim.runtimes import torch_eager
from omgoptim.runtimes.engine import Engine, Session, SessionSettings
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from torch import nn


def missing(device: str) -> str | None:
    """Return why torch.compile cannot be used on a device, or None."""
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return "torch.compile needs a C++ compiler and none is on the PATH: install g++ or clang"
    if sys.platform == "win32" and device == "cuda":
        return "torch.compile on CUDA needs Triton, which torch does not ship for Windows"
    return torch_eager.missing(device)


def open_session(module: nn.Module, signature: Signature, settings: SessionSettings) -> Session:
    """Compile a module by `torch.compile` and open it."""
    import torch

    from omgoptim.runtimes.torch_session import open_module

    return open_module(module, torch.compile(module, dynamic=True), signature, settings)


ENGINE = Engine("torch_compile", "module", missing, open_session)
