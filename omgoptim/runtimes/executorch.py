"""ExecuTorch engine for `.pte` programs, lowered to XNNPACK, on CPUs: the runtime of Android and iOS apps.

Its Python binding is linked against libtorch, so a measuring process holds torch too (some 200 MB); an app does not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.runtimes.engine import Engine, NumpyBatch, Session, SessionSettings, wall_clock
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = {
    "executorch": "executorch.extension",
    "torchao": "torchao",
    "ruamel.yaml": "ruamel.yaml",
    "flatbuffers": "flatbuffers",
    "tabulate": "tabulate",
}
"""Packages that exporting and running need, to a module of each; executorch lists more for other backends."""

ONE_SAMPLE = "an ExecuTorch program has a fixed batch size, 1 for use on devices"
"""Reason for measuring at batch 1."""


def missing(device: str) -> str | None:
    """Return why this Python cannot use ExecuTorch on a device, or None."""
    lacking = [name for name, module in PACKAGES.items() if not _is_installed(module)]
    if lacking:
        verb = "are" if len(lacking) > 1 else "is"
        return f"{', '.join(lacking)} {verb} not installed: pip install {' '.join(lacking)}"
    return None if device == "cpu" else "omgoptim runs ExecuTorch on the CPU only"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def open_session(program: Path, signature: Signature, settings: SessionSettings) -> Session:
    """Open a `.pte` file in ExecuTorch's runtime, without its exporter."""
    import torch  # loads the libraries that the binding is linked against

    with _silent():
        from executorch.extension.pybindings import _C

        _C._unsafe_reset_threadpool(settings.threads)
        method = _C._load_for_executorch(str(program))
    from omgoptim.runtimes.torch_engines import to_array, to_tensor

    inputs = sorted(signature.inputs, key=lambda tensor: tensor.keyword)  # stable: as torch.export flattens them

    def prepare(batch: NumpyBatch) -> tuple[Tensor, ...]:
        return tuple(to_tensor(batch[tensor.name], tensor.dtype).contiguous() for tensor in inputs)

    def call(tensors: tuple[Tensor, ...]) -> Any:
        return method.forward(tensors, False)  # the outputs stay in the program's own memory until the next call

    def to_numpy(result: Any) -> list[NDArray[Any]]:
        return [np.array(to_array(value)) for value in result if isinstance(value, torch.Tensor)]

    return Session(prepare, call, to_numpy, wall_clock(call))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence the native libraries' output about the processor on loading."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


ENGINE = Engine("executorch", "lowered", missing, open_session)
