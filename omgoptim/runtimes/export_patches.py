"""Temporary patches of a module and of torch's exporter for forms that torch.export does not accept.

Each is a context manager that puts back what it changed, also on an error.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import keyword
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.runtimes.signature import Signature, flatten, holds_class

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def exportable_forward(module: nn.Module, signature: Signature) -> Iterator[None]:
    """Wrap a forward that takes `**kwargs` with named parameters, which torch.export needs for dynamic dimensions.

    Models of transformers have such forwards. `len` of a tensor is symbolic while the context is open, and children
    whose names torch.fx cannot take are renamed: see `RENAMED`.
    """
    with (
        _symbolic_len(module),
        _free_names(module),
        _named_parameters(module, signature),
        _plain_outputs(module, signature),
    ):
        yield


RENAMED = "_of_the_model"
"""Suffix, while a model is exported, of children, parameters and buffers that are called as an attribute of torch.fx's
GraphModule (graph, code, meta): a program with such names cannot be opened."""


@contextlib.contextmanager
def _free_names(module: nn.Module) -> Iterator[None]:
    import torch

    taken = {"meta", *(set(dir(torch.fx.GraphModule)) - set(dir(torch.nn.Module)))}
    stores: tuple[dict[str, Any], ...] = (module._modules, module._parameters, module._buffers)
    before = [dict(store) for store in stores]
    renamed = {name: value for store in before for name, value in store.items() if name in taken}
    for store, original in zip(stores, before, strict=True):
        store.clear()
        store.update({f"{name}{RENAMED}" if name in renamed else name: value for name, value in original.items()})
    module.__dict__.update(renamed)  # forward finds them as before
    try:
        yield
    finally:
        for name in renamed:
            module.__dict__.pop(name, None)
        for store, original in zip(stores, before, strict=True):
            store.clear()
            store.update(original)


@contextlib.contextmanager
def _symbolic_len(module: nn.Module) -> Iterator[None]:
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


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute within the block; afterwards the owner has its own one back, or none."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def _plain_outputs(module: nn.Module, signature: Signature) -> Iterator[None]:
    """Wrap a forward that returns a dataclass or a named tuple to return a tuple: torch.export knows no such class."""
    if not holds_class(signature.outputs):
        yield
        return
    forward = module.forward

    @functools.wraps(forward)
    def flattened(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(flatten(forward(*args, **kwargs)))

    with _replaced(module, "forward", flattened):
        yield


@contextlib.contextmanager
def _named_parameters(module: nn.Module, signature: Signature) -> Iterator[None]:
    forward = module.forward
    parameters = inspect.signature(forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if not anything or all(tensor.name in parameters for tensor in signature.inputs):
        yield
        return

    def spelled_out(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(tensor.name, kind) for tensor in signature.inputs]
    spelled_out.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    with _replaced(module, "forward", spelled_out):
        yield


@contextlib.contextmanager
def keywords_as_names() -> Iterator[None]:
    """Let torch.fx write code for submodules that are named by a keyword of Python, such as `ModuleDict({"in": …})`.

    torch.fx 2.9 to 2.13 writes `self.parts.in`, which is a syntax error.
    """
    import torch.fx.graph

    original = torch.fx.graph._format_target

    def format_target(base: str, target: str) -> str:
        for name in target.split("."):
            base = f"getattr({base}, {name!r})" if keyword.iskeyword(name) else original(base, name)
        return base

    with _replaced(torch.fx.graph, "_format_target", format_target):
        yield


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Silence torch's exporters: their progress lines, and remarks on packages that are not needed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def specializing_line(export: Callable[[], Any]) -> str | None:
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
        with contextlib.suppress(Exception):  # the failure is known; only its location is needed
            export()
    finally:
        ShapeEnv._set_replacement = replace  # type: ignore[method-assign]
    return found[0] if found else None


def _is_library(filename: str) -> bool:
    package = Path(__file__).parent.parent
    path = Path(filename)
    return package in path.parents or "site-packages" in path.parts or filename.startswith("<")
