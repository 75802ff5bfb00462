"""Validation of the pytrees of an exported program's inputs and outputs, stored as JSON in a string.

torch's reader imports modules that a structure names (enumerations, the factory of a `defaultdict`), and writes the
names of keyword arguments into generated Python. Accepted are tuples, lists and dictionaries with plain keys, and the
output classes that transformers registers.
"""

from __future__ import annotations

import json
from typing import Any

from omgoptim.models._pt2.symbols import RejectedProgram
from omgoptim.models._pt2.validators import Validator, mapping, name, text

LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", "collections.deque")
"""Containers of Python that torch's pytree registers and that hold no code."""
PYTREE_DEPTH = 100
"""Limit of nesting, well below Python's recursion limit of 1000."""


def tree(root: str) -> Validator:
    """Validate a pytree's structure. Its contexts can name modules to import: plain keys only.

    Args:
        root: "inputs", whose second part holds keyword arguments, or "outputs".
    """

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise RejectedProgram(where, "it is not text")
        try:
            version, tree = json.loads(value)
        except (ValueError, TypeError) as error:
            raise RejectedProgram(where, "it is not a structure of inputs or outputs") from error
        if version != 1:
            raise RejectedProgram(where, "its structure is of another version")
        return json.dumps([1, _node(tree, where, 0, () if root == "inputs" else (None,))])

    return check


def _node(value: Any, where: str, depth: int, place: tuple[int | None, ...]) -> dict[str, Any]:
    """Validate one level of a pytree; `place` are the indices from the root, to find the keyword arguments."""
    if value == LEAF:
        return dict(LEAF)
    kind, context, children = (mapping(value, where).get(part) for part in LEAF)
    if depth > PYTREE_DEPTH or not isinstance(children, list) or not isinstance(context, str):
        raise RejectedProgram(where, "its structure is not understood")
    if kind not in CONTAINERS and not _is_output_record(kind):
        raise RejectedProgram(
            where, f"inputs or outputs in a {str(kind)[:80]!r}: tuples, lists and dictionaries are read"
        )
    try:
        keys = json.loads(context)
    except ValueError as error:
        raise RejectedProgram(where, "its structure is not understood") from error
    for key in keys if isinstance(keys, list) else [keys]:
        if place == (1,) and kind == "builtins.dict":
            name(key, f"{where}: a keyword argument")
        elif not isinstance(key, (int, float, type(None))):
            text(key, f"{where}: a key")
    inner = [_node(child, where, depth + 1, (*place, index)) for index, child in enumerate(children)]
    return {"type": kind, "context": json.dumps(keys), "children_spec": inner}


def _is_output_record(kind: Any) -> bool:
    """Return whether the class is an output of transformers that the library registered, without a custom reader."""
    from torch.utils import _pytree

    if not isinstance(kind, str) or not kind.startswith("transformers."):
        return False
    registered = _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(kind)
    reader = _pytree.SUPPORTED_SERIALIZED_TYPES.get(registered) if registered else None
    return reader is not None and reader.from_dumpable_context is None
