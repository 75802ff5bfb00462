"""Deduplication of tied weights in an exported program, transposed copies included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn


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
        if not _fits(parameters[names[0]]):
            continue
        array = parameters[names[0]].detach().cpu().numpy()
        copies = [value for value in graph.initializers.values() if _same_size(value, array)]
        plain = [value for value in copies if _equal(value, array)]
        turned = [value for value in copies if value not in plain and array.ndim == 2 and _equal(value, array.T)]
        if not plain and len(turned) > 1:  # only ever read transposed
            plain, turned = turned, []
        for value in plain[1:]:
            value.replace_all_uses_with(plain[0])
        for value in turned if plain else []:
            _read_transposed(graph, plain[0], value)
        gone = [*plain[1:], *(turned if plain else [])]
        for value in gone:
            del graph.initializers[value.name]
        saved += len(gone) * array.nbytes
    return saved


def _fits(parameter: Any) -> bool:
    return bool(parameter.numel()) and str(parameter.dtype) in ("torch.float32", "torch.float64", "torch.float16")


def _same_size(value: Any, array: NDArray[Any]) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.size == array.size and not value.is_graph_output()


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
