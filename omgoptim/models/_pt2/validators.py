"""Validators of values in an exported program's JSON, their combinators, and the operators that are allowed.

torch finds an operator by `getattr` from the name in the file, and calls the result: `torch.load`,
`torch.ops.load_library` and `_operator.methodcaller` included. So names must be registered tensor operators, except the
few that read or write files.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from omgoptim.models._pt2.symbols import RejectedProgram, check_expression

Validator = Callable[[Any, str], Any]
"""Takes a value and its location; returns a checked copy or raises `RejectedProgram`."""

MAX_LIST = 10_000_000
"""Limit of a list's length, against memory exhaustion: a program has one entry for each operator and tensor."""
MAX_TEXT = 10_000
"""Limit of a text's length, in characters: module paths and einsum equations have hundreds."""
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""ASCII identifiers of Python."""
PATH = re.compile(r"[\w\-/ :+@,]+(\.[\w\-/ :+@,]+)*")
"""A dotted module path. Quotes, brackets and backslashes are out: the path becomes Python text."""

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


def object_of(**fields: Validator) -> Validator:
    """Validate an object of these fields; any may be absent, and others must be empty."""

    def check(value: Any, where: str) -> dict[str, Any]:
        for name, content in mapping(value, where).items():
            if name not in fields and content not in (None, False, 0, "", [], {}):
                raise RejectedProgram(where, f"it has an unknown field {name[:60]!r}")
        return {name: check(value[name], f"{where}.{name}") for name, check in fields.items() if name in value}

    return check


def one_of(**kinds: Validator) -> Validator:
    """Validate an object with exactly one of these fields."""

    def check(value: Any, where: str) -> dict[str, Any]:
        names = list(mapping(value, where))
        if len(names) != 1 or names[0] not in kinds:
            raise RejectedProgram(where, f"it is of an unknown kind: {', '.join(names)[:80]!r}")
        return {names[0]: kinds[names[0]](value[names[0]], f"{where}.{names[0]}")}

    return check


def list_of(item: Validator) -> Validator:
    """Validate a list."""

    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > MAX_LIST:
            raise RejectedProgram(where, "it is not a list")
        return [item(content, f"{where}[{index}]") for index, content in enumerate(value)]

    return check


def mapping_of(key: Validator, item: Validator) -> Validator:
    """Validate an object whose keys are data."""

    def check(value: Any, where: str) -> dict[str, Any]:
        return {
            key(name, where): item(content, f"{where}[{name[:60]!r}]")
            for name, content in mapping(value, where).items()
        }

    return check


def optional(item: Validator) -> Validator:
    """Validate a value or null."""
    return lambda value, where: None if value is None else item(value, where)


def replaced_by(replacement: Any) -> Validator:
    """Ignore the value and use `replacement` instead."""
    return lambda _value, _where: replacement


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RejectedProgram(where, "it is not an object")
    return value


def integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**64:
        raise RejectedProgram(where, "it is not a 64-bit integer")
    return value


def number(value: Any, where: str) -> float | str:
    if value in ("Infinity", "-Infinity", "NaN"):
        return str(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1.8e308:
        raise RejectedProgram(where, "it is not a number")
    return value


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise RejectedProgram(where, "it is neither true nor false")
    return value


def text(value: Any, where: str) -> str:
    """Validate a line of printable text without double quotes or backslashes: engines write it into generated code."""
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable() or set(value) & set('"\\'):
        raise RejectedProgram(where, "it is not a single line of printable text")
    return value


def cleaned(value: Any, where: str) -> str:
    """Convert a message for people to a plain line of text."""
    if not isinstance(value, str):
        raise RejectedProgram(where, "it is not text")
    shown = value[: 10 * MAX_TEXT].replace('"', "'").replace("\\", "/")
    return "".join(c if c.isprintable() else " " for c in shown)


def name(value: Any, where: str) -> str:
    """Validate an identifier: it becomes the name of a variable in generated Python."""
    if not isinstance(value, str) or len(value) > 1000 or not IDENTIFIER.fullmatch(value):
        raise RejectedProgram(where, f"{str(value)[:80]!r} is not a plain identifier")
    if keyword.iskeyword(value) or (value.startswith("__") and value.endswith("__")):
        raise RejectedProgram(where, f"{value[:80]!r} is a reserved word of Python")
    return value


def unnamed_or(check: Validator) -> Validator:
    return lambda value, where: value if value == "" else check(value, where)


def path(value: Any, where: str) -> str:
    """Validate the dotted path of a parameter, buffer, constant or submodule."""
    if not isinstance(value, str) or len(value) > 2000 or not PATH.fullmatch(value):
        raise RejectedProgram(where, f"{str(value)[:80]!r} is not a module path")
    if any(part.startswith("__") for part in value.split(".")):
        raise RejectedProgram(where, f"{value[:80]!r} is an internal attribute of Python")
    return value


def symbol(value: Any, where: str) -> str:
    """Validate the name of a dimension. Its digits count torch's symbols, one loop each, so there are few."""
    if not isinstance(value, str) or len(value) > 200:
        raise RejectedProgram(where, "it is not a symbol")
    if re.fullmatch(r"[A-Za-z]{1,8}\d{0,6}", value):
        return value
    return check_expression(value, where)


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
