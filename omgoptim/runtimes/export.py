"""Export of an nn.Module to ONNX or .pt2 with a dynamic batch, through torch.export.

The example batch has at least two samples, since torch.export makes a dimension of 1 a constant; and it is made of
fresh tensors, since an exported program would otherwise store the whole storage of a user's data.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import keyword
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import TechniqueError
from omgoptim.runtimes.dynamic_batch import (
    fixed_batch_error,
    fixed_batch_reason,
    has_fixed_batch,
    is_constraint_violation,
    symbolic_len,
)
from omgoptim.runtimes.signature import BATCH, Signature, flatten, holds_class
from omgoptim.runtimes.tied_weights import share_tied_weights
from omgoptim.text import clean

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

MAX_ONE_FILE_BYTES = 2**31 - 2**24
"""Protobuf's limit of a single file, 2 GiB less a margin; larger weights go to an external data file."""


def export_onnx(
    module: nn.Module,
    batch: Mapping[str, Tensor],
    signature: Signature,
    path: Path,
    *,
    or_at_one: bool = False,
) -> str | None:
    """Write `module` as an ONNX file whose inputs and outputs carry the signature's names.

    Args:
        module: in eval mode, on the CPU, float32.
        batch: example inputs by name, at least two samples each.
        signature: positional and keyword inputs, and dynamic dimensions.
        path: the file to write.
        or_at_one: export at batch 1 if the module's code fixes the batch, instead of raising.

    Returns:
        None; or the reason for batch 1, with the line of the user's code that fixes the batch.

    Raises:
        TechniqueError: torch cannot export the model, with torch's reason; or only with the example's batch, with the
            line of the user's code that fixes it.
    """
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    with quiet_export(), _keywords_as_names(), _spelled_out(module, signature):
        program = _onnx_program(module, batch, signature)
        if program is not None:
            for node in program.model.graph:  # the exporter notes the lines of the user's files on every node
                node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
            share_tied_weights(program.model, module)
            program.save(str(path), external_data=size > MAX_ONE_FILE_BYTES)
            return None
    reason = _why_fixed(module, batch, signature)
    if not or_at_one:
        raise fixed_batch_error(reason)
    export_onnx(module, first_sample(batch), signature.at_batch(1), path)
    return reason


def _onnx_program(module: nn.Module, batch: Mapping[str, Tensor], signature: Signature) -> Any:
    """Export the program; None if the module's code makes the dynamic batch a constant."""
    import torch

    args, kwargs = signature.to_call({name: tensor.clone() for name, tensor in batch.items()})
    try:
        program = torch.onnx.export(
            module,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(module, signature),
            input_names=signature.input_names,
            output_names=signature.output_names,
            verbose=False,
        )
    except Exception as error:
        if is_constraint_violation(error):
            return None
        raise TechniqueError(
            "the model cannot be exported to ONNX",
            _cause(error),
            "see torch.export's limits (control flow on values, unsupported operators); torch runtimes still work",
        ) from error
    if program is None:
        raise TechniqueError("the model cannot be exported to ONNX", "torch.onnx.export returned no program")
    stated = {str(value.name): list(value.shape or ()) for value in program.model.graph.inputs}
    return None if has_fixed_batch(stated, signature) else program


def export_pt2(
    module: nn.Module,
    batch: Mapping[str, Tensor],
    signature: Signature,
    path: Path,
    *,
    or_at_one: bool = False,
) -> str | None:
    """Write `module` as a .pt2 file; arguments, result and errors as for `export_onnx`."""
    import torch

    keywords = next((key for key in module.state_dict() if any(map(keyword.iskeyword, key.split(".")))), None)
    if keywords is not None:
        raise TechniqueError(
            "the model cannot be exported to .pt2",
            f"'{keywords}' has a keyword of Python as a name, and torch cannot load a program with it",
            "rename it, with its key in the checkpoint; ONNX programs and torch runtimes take the model as it is",
        )
    try:
        program = exported_program(module, batch, signature)
    except TechniqueError as error:
        if not is_constraint_violation(error):
            raise
    else:
        torch.export.save(program, path)
        return None
    reason = _why_fixed(module, batch, signature)
    if not or_at_one:
        raise fixed_batch_error(reason)
    export_pt2(module, first_sample(batch), signature.at_batch(1), path)
    return reason


def exported_program(module: nn.Module, batch: Mapping[str, Tensor], signature: Signature) -> ExportedProgram:
    """Return the program that torch.export makes of a module.

    Raises:
        TechniqueError: torch cannot export the model, with torch's reason.
    """
    import torch

    args, kwargs = signature.to_call({name: tensor.clone() for name, tensor in batch.items()})
    with quiet_export(), _spelled_out(module, signature):
        try:
            shapes = _dynamic_shapes(module, signature)
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            raise TechniqueError(
                "the model cannot be exported",
                _cause(error),
                "give it as file.py:callable instead of as a live module: then it is rebuilt from its own code",
            ) from error


def first_sample(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first sample of a batch as a batch of one."""
    return {name: values[:1] for name, values in batch.items()}


def _why_fixed(module: nn.Module, batch: Mapping[str, Tensor], signature: Signature) -> str:
    import torch

    args, kwargs = signature.to_call({name: tensor.clone() for name, tensor in batch.items()})

    def export() -> Any:
        shapes = _dynamic_shapes(module, signature)
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)

    with quiet_export(), _spelled_out(module, signature):
        return fixed_batch_reason(signature.input_names[0], export)


def _dynamic_shapes(module: nn.Module, signature: Signature) -> dict[str, Any]:
    """Return torch.export's `dynamic_shapes`: parameter name of forward to {dimension: Dim}."""
    import torch

    dims = {BATCH: torch.export.Dim(BATCH, min=1)}
    shapes: dict[str, Any] = {}
    for tensor in signature.inputs:
        free = {axis: name for axis, name in enumerate(tensor.shape) if isinstance(name, str)}
        shapes[tensor.name] = {axis: dims.setdefault(name, torch.export.Dim.AUTO) for axis, name in free.items()}
    parameters = inspect.signature(module.forward).parameters
    gathered: dict[str, Any] = {name: shapes.pop(name) for name in list(shapes) if name in parameters}
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional = [t.name for t in signature.inputs if not t.keyword and t.name in shapes]
            gathered[parameter.name] = tuple(shapes.pop(name) for name in positional)
    return gathered


@contextlib.contextmanager
def _spelled_out(module: nn.Module, signature: Signature) -> Iterator[None]:
    """Wrap a forward that takes `**kwargs` with named parameters, which torch.export needs for dynamic dimensions.

    Models of transformers have such forwards. `len` of a tensor is symbolic while the context is open.
    """
    with symbolic_len(module), _spelled_out_forward(module, signature), _plain_outputs(module, signature):
        yield


@contextlib.contextmanager
def _plain_outputs(module: nn.Module, signature: Signature) -> Iterator[None]:
    """Wrap a forward that returns a dataclass or a named tuple to return a tuple: torch.export knows no such class."""
    if not holds_class(signature.outputs):
        yield
        return
    forward, own = module.forward, module.__dict__.get("forward")

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return tuple(flatten(forward(*args, **kwargs)))

    module.forward = plain
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextlib.contextmanager
def _spelled_out_forward(module: nn.Module, signature: Signature) -> Iterator[None]:
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
    own = module.__dict__.get("forward")
    module.forward = spelled_out
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextlib.contextmanager
def _keywords_as_names() -> Iterator[None]:
    """Let torch.fx write code for submodules that are named by a keyword of Python, such as `ModuleDict({"in": …})`.

    torch.fx 2.9 to 2.13 writes `self.parts.in`, which is a syntax error.
    """
    import torch.fx.graph

    own = torch.fx.graph._format_target

    def format_target(base: str, target: str) -> str:
        for name in target.split("."):
            base = f"getattr({base}, {name!r})" if keyword.iskeyword(name) else own(base, name)
        return base

    torch.fx.graph._format_target = format_target
    try:
        yield
    finally:
        torch.fx.graph._format_target = own


def _cause(error: BaseException) -> str:
    """Return the innermost cause's message: the exporter wraps the reason in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return clean(f"{type(error).__name__}: {' '.join(lines[:4])}", 600)


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Silence torch's exporters: their progress lines, and remarks on packages that are not needed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
