"""Allowed operators of an exported program: torch's tensor operators, arithmetic, and control flow.

torch finds an operator by `getattr` from the name in the file, and calls the result: `torch.load`,
`torch.ops.load_library` and `_operator.methodcaller` included. So names must be registered
tensor operators, except the few that read or write files.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from omgoptim.models._pt2.symbols import RejectedProgram

ARITHMETIC = frozenset(
    {
        *(f"_operator.{name}" for name in ("eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub")),
        *(f"_operator.{name}" for name in ("floordiv", "mod", "pow", "truediv", "and_", "or_", "lshift", "rshift")),
        *(f"_operator.{name}" for name in ("getitem", "abs", "not_")),
        *(f"math.{name}" for name in ("trunc", "ceil", "floor", "sqrt")),
        *(f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt", "sum")),
    }
)
CONTROL_FLOW = frozenset(
    f"torch.ops.higher_order.{name}"
    for name in (
        *("cond", "while_loop", "map_impl", "scan", "associative_scan", "out_dtype", "invoke_subgraph"),
        *("wrap_with_set_grad_enabled", "wrap_with_autocast"),
    )
)
"""Higher-order operators whose functions are graphs of the same file."""

VMAP = frozenset(
    f"torch._functorch.predispatch.{name}"
    for name in (
        *("_add_batch_dim", "_remove_batch_dim", "_vmap_increment_nesting", "_vmap_decrement_nesting"),
        "lazy_load_decompositions",
    )
)
"""Operators of torch.vmap that export keeps in the graph."""
NAMESPACES = frozenset({"aten", "prims", "quantized", "quantized_decomposed"})
"""Namespaces of torch's tensor operators."""
OF_TENSORS = re.compile(r"torch\.ops\.([a-z_]+)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
"""Form of an operator's name: namespace, name, overload."""
LEFT_OUT = re.compile(r"from_file|_print|.*_unsafe")
"""Operators that open files or write to the terminal, and those that build sparse tensors unchecked."""


def check_operator(value: Any, where: str) -> str:
    """Return the operator's name if a program may call it.

    Raises:
        RejectedProgram: it may not, or this torch does not have it.
    """
    if not isinstance(value, str):
        raise RejectedProgram(where, "it names no operator")
    if value in ARITHMETIC | CONTROL_FLOW | VMAP:
        return value
    match = OF_TENSORS.fullmatch(value)
    if match is None or match[1] not in NAMESPACES or not _is_of_tensors(*match.groups()):
        raise RejectedProgram(where, f"it calls {value[:100]!r}, which is not a tensor operator of torch")
    return value


def _is_of_tensors(namespace: str, name: str, overload: str) -> bool:
    """Return whether torch's dispatcher has the operator, and it takes no file name.

    TorchScript's interpreter has further operators in the same namespaces, `aten::save` among them.
    """
    if LEFT_OUT.fullmatch(name):
        return False
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(found, torch._ops.OpOverload):
        return False
    if not torch._C._dispatch_has_kernel(f"{namespace}::{name}" + ("" if overload == "default" else f".{overload}")):
        return False
    return not any("str" in str(a.type) and re.search("file|path", a.name) for a in found._schema.arguments)
