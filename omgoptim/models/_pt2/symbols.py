"""Validation of symbolic expressions, such as `FloorDiv(Symbol('s53', integer=True), Integer(4))`.

torch reads them with `sympy.sympify`, which is `eval`. Accepted are numbers, symbols, arithmetic and calls of
the functions below: no attribute, no subscript, no other name, and no value of enormous size.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any

MAX_LENGTH = 20_000
"""Limit of an expression's text, in characters, against slow parsing."""
MAX_BITS = 20_000
"""Largest size, in bits, that a number of an expression could have if it were computed: microseconds of work, and far
above the 64 bits of a dimension."""

SYMBOL = re.compile(r"[A-Za-z]{1,8}\d{1,6}|[A-Za-z][A-Za-z0-9_]{0,60}")
FREE_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,6}")
CONSTANTS = frozenset({"oo", "int_oo", "nan", "zoo", "true", "false"})
"""Constants of sympy in torch's expressions."""
POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
"""Functions whose result can be exponentially large."""
FUNCTIONS = POWERS | {
    *("Add", "Mul", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "RShift"),
    *("ModularIndexing", "Where", "Max", "Min", "Abs", "ceiling", "floor", "Identity"),
    *("CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "TruncToFloat", "RoundDecimal", "ToFloat"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "IsNonOverlappingAndDenseIndicator"),
}
NUMBERS = frozenset({"Integer", "Float", "Rational"})
"""Number classes of sympy."""


class RejectedProgram(ValueError):
    """A part of a file that fails validation, so that the file is not opened.

    Args:
        where: the place in the file.
        why: the reason of the rejection.
    """

    def __init__(self, where: str, why: str) -> None:
        self.where, self.why = where[-300:], why
        super().__init__(f"{self.where}: {why}")


def check_expression(value: Any, where: str) -> str:
    """Return the expression if it is arithmetic on symbols and numbers.

    Raises:
        RejectedProgram: it is not.
    """
    if not isinstance(value, str) or len(value) > MAX_LENGTH or not value.isascii() or not value.isprintable():
        raise RejectedProgram(where, "it is not a symbolic expression")
    try:
        tree = ast.parse(value, mode="eval")
    except (SyntaxError, ValueError, MemoryError) as error:
        raise RejectedProgram(where, f"{value[:80]!r} is not a symbolic expression") from error
    if _bits(tree.body, where) > MAX_BITS:
        raise RejectedProgram(where, f"{value[:80]!r} would be too large a number")
    return value


def _bits(node: ast.expr, where: str) -> int:
    """Return an upper bound, in bits, of an expression's value if its symbols have 64."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return max(64, node.value.bit_length()) if isinstance(node.value, int) else 64
    if isinstance(node, ast.Name) and (node.id in CONSTANTS or FREE_SYMBOL.fullmatch(node.id)):
        return 64
    if isinstance(node, ast.UnaryOp):
        return _bits(node.operand, where)
    if isinstance(node, ast.BinOp):
        left, right = _bits(node.left, where), _bits(node.right, where)
        if isinstance(node.op, ast.Pow):
            return _limited(left * _exponent(node.right, where), where)
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)):
            return _limited(left + right, where)
    if isinstance(node, ast.Compare):
        return max(_bits(part, where) for part in (node.left, *node.comparators))
    if isinstance(node, ast.BoolOp):
        return max(_bits(part, where) for part in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node, node.func.id, where)
    raise RejectedProgram(where, f"a symbolic expression contains the unsupported {ast.unparse(node)[:80]!r}")


def _call(node: ast.Call, function: str, where: str) -> int:
    if function == "Symbol":
        return _symbol(node, where)
    if function in NUMBERS:
        return _number(node, where)
    if function not in FUNCTIONS or node.keywords:
        raise RejectedProgram(where, f"a symbolic expression calls {function[:80]!r}, which is not allowed")
    sizes = [_bits(argument, where) for argument in node.args]
    if function in POWERS:
        if len(sizes) != 2:
            raise RejectedProgram(where, f"{function} is called with {len(sizes)} arguments")
        return _limited(sizes[0] * _exponent(node.args[1], where), where)
    return _limited(sum(sizes), where)


def _symbol(node: ast.Call, where: str) -> int:
    named = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    plain = all(isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool) and k.arg for k in node.keywords)
    if len(node.args) != 1 or not plain or not named or not isinstance(named[0], str):
        raise RejectedProgram(where, "it contains a malformed symbol")
    if not SYMBOL.fullmatch(named[0]):
        raise RejectedProgram(where, f"it contains a symbol with the invalid name {named[0][:80]!r}")
    return 64


def _number(node: ast.Call, where: str) -> int:
    """Validate `Integer(3)`, `Rational(1, 2)` or `Float('0.5', precision=53)`."""
    bits = 0
    for part in (*node.args, *(keyword.value for keyword in node.keywords)):
        value = ast.literal_eval(part) if isinstance(part, (ast.Constant, ast.UnaryOp)) else None
        if isinstance(value, str) and re.fullmatch(r"[-+0-9.e]{1,80}", value):
            exponent = value.partition("e")[2]
            value = float(value) if re.fullmatch(r"[-+]?\d{1,3}|", exponent) else None
        if not isinstance(value, (int, float)):
            raise RejectedProgram(where, "it contains a malformed number")
        bits += value.bit_length() if isinstance(value, int) else 64
    if any(k.arg != "precision" or not _literal(k.value, 200) for k in node.keywords):
        raise RejectedProgram(where, "it contains a malformed number")
    return _limited(max(64, bits), where)


def _exponent(node: ast.expr, where: str) -> int:
    """Return the factor by which a power multiplies the base's bits; the exponent is a small number or a symbol."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"Integer", "Rational"}:
        sizes = [_literal(argument, 64) for argument in node.args]
        if sizes and all(sizes):
            return max(sizes)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Float":
        text = getattr(node.args[0], "value", None) if node.args else None
        if isinstance(text, str) and re.fullmatch(r"-?\d{1,2}(\.\d{1,60})?", text):
            return max(1, math.ceil(abs(float(text))))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Symbol":
        return 1
    elif _literal(node, 64):
        return _literal(node, 64)
    elif isinstance(node, ast.Name) and FREE_SYMBOL.fullmatch(node.id):
        return 1
    raise RejectedProgram(where, "the exponent of a power is not a small constant")


def _literal(node: ast.expr, limit: int) -> int:
    """Return the absolute value of an integer literal, at least 1, if it is at most `limit`; otherwise 0."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) <= limit:
        return max(1, abs(node.value))
    return 0


def _limited(bits: int, where: str) -> int:
    if bits > MAX_BITS:
        raise RejectedProgram(where, "the value of a symbolic expression would be too large")
    return bits
