"""Dynamic batch of an export, and the line of the user's code that makes it a constant."""

from __future__ import annotations

import builtins
import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import TechniqueError
from omgoptim.runtimes.signature import BATCH, Signature

if TYPE_CHECKING:
    from torch import nn

DYNAMIC_BATCH_FIX = "take the batch from x.shape[0] and pass it on as it is, without int(), range() or a branch on it"
"""Advice for a line that fixes the batch."""


@contextlib.contextmanager
def symbolic_len(module: nn.Module) -> Iterator[None]:
    """Replace `len(tensor)` in the model's own forwards by `tensor.shape[0]` while the context is open.

    Python's `len` returns an integer, so that torch.export makes the example's batch a constant; the shape is symbolic.
    """
    import torch

    def length(sized: Any) -> Any:
        return sized.shape[0] if isinstance(sized, torch.Tensor) and sized.ndim else builtins.len(sized)

    changed: list[dict[str, Any]] = []
    for part in module.modules():
        forward = getattr(part.forward, "__func__", part.forward)
        names = getattr(forward, "__globals__", None)
        if names is None or "len" in names or str(names.get("__name__", "")).partition(".")[0] == "torch":
            continue
        names["len"] = length
        changed.append(names)
    try:
        yield
    finally:
        for names in changed:
            names.pop("len", None)


def has_fixed_batch(shapes: Mapping[str, Sequence[Any]], signature: Signature) -> bool:
    """Return whether an input's dynamic batch became a constant in an exported program.

    Args:
        shapes: the program's own inputs: name to sizes, integers where they are fixed.
        signature: the module's inputs, with the axes that are dynamic.
    """
    return any(
        tensor.shape[0] == BATCH and shapes.get(tensor.name) and isinstance(shapes[tensor.name][0], int)
        for tensor in signature.inputs
    )


def is_constraint_violation(error: BaseException | None) -> bool:
    """Return whether torch.export rejected a model because a dynamic dimension is a constant in it."""
    from torch._dynamo.exc import UserError, UserErrorType

    while error is not None:
        if isinstance(error, UserError) and error.error_type is UserErrorType.CONSTRAINT_VIOLATION:
            return True
        error = error.__cause__
    return False


def fixed_batch_reason(name: str, export: Callable[[], Any]) -> str:
    """Return the input that fixes the batch and, if torch.export reports it, the line of the user's code.

    Args:
        name: of the input whose batch became a constant.
        export: exports the model again.
    """
    line = _specializing_line(export)
    where = f"the batch becomes a Python number in {line}" if line else f"the batch of input '{name}' becomes a number"
    return f"torch.export fixes the batch to that of the example: {where}"


def fixed_batch_error(reason: str) -> TechniqueError:
    """Return the error for a model that needs a dynamic batch."""
    return TechniqueError(
        "the export fixes the batch to that of the example, so no engine can run it at another",
        reason,
        f"{DYNAMIC_BATCH_FIX}; torch runtimes still work",
    )


def _specializing_line(export: Callable[[], Any]) -> str | None:
    """Return the line, `net.py, line 12: …`, where torch.export first fixed a symbolic size; None if unreported."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    replace = getattr(ShapeEnv, "_set_replacement", None)  # private to torch: without it there is no line
    if replace is None:
        return None
    found: list[str] = []

    def record_line(*args: Any, **kwargs: Any) -> Any:
        if not found and len(args) > 2 and getattr(args[2], "is_number", False):
            frames = [frame for frame in traceback.extract_stack() if not _is_library(frame.filename)]
            if frames:
                last = frames[-1]
                found.append(f"{Path(last.filename).name}, line {last.lineno}: {last.line}")
        return replace(*args, **kwargs)

    ShapeEnv._set_replacement = record_line  # type: ignore[method-assign]
    try:
        with contextlib.suppress(Exception):  # the failure is known; only its place is needed
            export()
    finally:
        ShapeEnv._set_replacement = replace  # type: ignore[method-assign]
    return found[0] if found else None


def _is_library(filename: str) -> bool:
    package = Path(__file__).parent.parent
    path = Path(filename)
    return package in path.parents or "site-packages" in path.parts or filename.startswith("<")
