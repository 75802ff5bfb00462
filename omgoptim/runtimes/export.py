"""Export of an nn.Module to ONNX or .pt2 with a dynamic batch, by torch.export.

The example batch has at least two samples, since torch.export makes a dimension of 1 a constant; and it is made of
fresh tensors, since an exported program would otherwise store the whole storage of a user's data.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import TechniqueError
from omgoptim.runtimes.export_patches import (
    RENAMED,
    exportable_forward,
    keywords_as_names,
    quiet_export,
    specializing_line,
)
from omgoptim.runtimes.signature import BATCH, Signature
from omgoptim.text import clean

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

DYNAMIC_BATCH_FIX = "use x.shape[0] as the batch size in forward, without int(), range() or a branch on it"
"""Advice for a line that fixes the batch."""

MAX_ONE_FILE_BYTES = 2**31 - 2**24
"""Protobuf's limit of a single file, 2 GiB less a margin; larger weights go to an external data file."""


def export_onnx(
    module: nn.Module, batch: Mapping[str, Tensor], signature: Signature, path: Path, *, or_at_one: bool = False
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
    with quiet_export(), keywords_as_names(), exportable_forward(module, signature):
        program = _onnx_program(module, batch, signature)
        if program is not None:
            for node in program.model.graph:  # the exporter notes the lines of the user's files on every node
                node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
                node.metadata_props.update({k: v.replace(RENAMED, "") for k, v in node.metadata_props.items()})
            for value in list(program.model.graph.initializers.values()):
                if RENAMED in value.name:
                    value.name = value.name.replace(RENAMED, "")
            share_tied_weights(program.model, module)
            index_in_int64(program.model)
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
            "see torch.export's limits (data-dependent control flow, unsupported operators), or use a torch runtime",
        ) from error
    if program is None:
        raise TechniqueError("the model cannot be exported to ONNX", "torch.onnx.export returned no program")
    stated = {str(value.name): list(value.shape or ()) for value in program.model.graph.inputs}
    return None if has_fixed_batch(stated, signature) else program


def export_pt2(
    module: nn.Module, batch: Mapping[str, Tensor], signature: Signature, path: Path, *, or_at_one: bool = False
) -> str | None:
    """Write `module` as a .pt2 file; arguments, result and errors as for `export_onnx`."""
    import torch

    keywords = next((key for key in module.state_dict() if any(map(keyword.iskeyword, key.split(".")))), None)
    if keywords is not None:
        raise TechniqueError(
            "the model cannot be exported to .pt2",
            f"'{keywords}' contains a Python keyword, and torch cannot load a program with such a name",
            "rename the module and its checkpoint keys; ONNX programs and torch runtimes need no change",
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
    with quiet_export(), exportable_forward(module, signature):
        try:
            shapes = _dynamic_shapes(module, signature)
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:
            raise TechniqueError(
                "the model cannot be exported",
                _cause(error),
                "give the model as file.py:callable instead of a live module: it is then rebuilt from its code",
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

    with quiet_export(), exportable_forward(module, signature):
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


def _cause(error: BaseException) -> str:
    """Return the message of the innermost cause: the exporter adds pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return clean(f"{type(error).__name__}: {' '.join(lines[:4])}", 600)


# Fixed batch


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
    line = specializing_line(export)
    where = f"it becomes a Python int at {line}" if line else f"it becomes a constant in input '{name}'"
    return f"torch.export specialized the batch size: {where}"


def fixed_batch_error(reason: str) -> TechniqueError:
    """Return the error for a model that needs a dynamic batch."""
    return TechniqueError(
        "the exported program has a fixed batch size, so no engine can run it at another",
        reason,
        f"{DYNAMIC_BATCH_FIX}; or use a torch runtime",
    )


def index_in_int64(program: Any) -> None:
    """Cast the int32 indices of ScatterND and GatherND, for which ONNX has int64 only; torch.istft exports such.

    Args:
        program: an `onnx_ir` model, which is changed.
    """
    import onnx_ir

    graph = program.graph
    for node in list(graph):
        indices = node.inputs[1] if node.op_type in ("ScatterND", "GatherND") else None
        if indices is None or indices.dtype != onnx_ir.DataType.INT32:
            continue
        cast = onnx_ir.node("Cast", [indices], {"to": onnx_ir.DataType.INT64}, name=f"{node.name}_indices")
        cast.outputs[0].name, cast.outputs[0].shape = f"{node.name}_indices", indices.shape
        cast.outputs[0].dtype = onnx_ir.DataType.INT64
        graph.insert_before(node, cast)
        node.replace_input_with(1, cast.outputs[0])


# Tied weights


def tied_weights(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several, in the module's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def share_tied_weights(program: Any, module: nn.Module) -> int:
    """Replace the copies of a tied weight in a program, transposed or not, by one initializer.

    A transposed copy becomes a `Transpose` of the kept one, which ONNX Runtime and OpenVINO fold when they open the
    file; equal weights that are not tied stay separate.

    Args:
        program: an `onnx_ir` model, which is changed.
        module: whose parameters say which weights are tied.

    Returns:
        The bytes saved.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    graph = program.graph
    saved = 0
    for names in tied_weights(module):
        parameter = parameters[names[0]]
        if not parameter.numel() or str(parameter.dtype) not in ("torch.float32", "torch.float64", "torch.float16"):
            continue
        array = parameter.detach().cpu().numpy()
        stored = [v for v in graph.initializers.values() if v.const_value is not None and not v.is_graph_output()]
        copies = [value for value in stored if value.const_value.size == array.size]
        same_layout = [value for value in copies if _equal(value, array)]
        transposed = [
            value for value in copies if value not in same_layout and array.ndim == 2 and _equal(value, array.T)
        ]
        if not same_layout and len(transposed) > 1:  # only ever read transposed
            same_layout, transposed = transposed, []
        for value in same_layout[1:]:
            value.replace_all_uses_with(same_layout[0])
        for value in transposed if same_layout else []:
            _read_transposed(graph, same_layout[0], value)
        removed = [*same_layout[1:], *(transposed if same_layout else [])]
        for value in removed:
            del graph.initializers[value.name]
        saved += len(removed) * array.nbytes
    return saved


def _equal(value: Any, array: NDArray[Any]) -> bool:
    stored = value.const_value.numpy()
    return stored.dtype == array.dtype and bool(np.array_equal(stored, array))


def _read_transposed(graph: Any, kept: Any, value: Any) -> None:
    """Insert a `Transpose` of the kept initializer where the other one was read."""
    import onnx_ir

    name = f"{kept.name}_Transposed"  # `onnx_graph.WEIGHT_NAME` reads the module from it
    node = onnx_ir.node("Transpose", [kept], {"perm": [1, 0]}, name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, value.type
    graph.insert_before(graph[0], node)
    value.replace_all_uses_with(output)
