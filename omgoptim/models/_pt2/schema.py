"""Schema of an exported program's JSON and of the pytrees in it, as composed validators.

torch's own reader evaluates parts of this text: symbolic expressions go through `eval`, operator names through
`getattr`, names of nodes and arguments into generated Python, and modules that a pytree names are imported. Here every
value is checked and copied into a new object, so that torch reads only checked values. Accepted pytrees are tuples,
lists and dictionaries with plain keys, and the output classes that transformers registers. Written for schema version
8, that of torch 2.9 to 2.13.
"""

from __future__ import annotations

import json
from typing import Any

from omgoptim.models._pt2.symbols import RejectedProgram, check_expression
from omgoptim.models._pt2.validators import (
    Validator,
    check_operator,
    cleaned,
    flag,
    integer,
    list_of,
    mapping,
    mapping_of,
    name,
    number,
    object_of,
    one_of,
    optional,
    path,
    replaced_by,
    symbol,
    text,
    unnamed_or,
)

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
            raise RejectedProgram(where, "it is not a pytree of inputs or outputs") from error
        if version != 1:
            raise RejectedProgram(where, "its pytree has an unsupported version")
        return json.dumps([1, _node(tree, where, 0, () if root == "inputs" else (None,))])

    return check


def _node(value: Any, where: str, depth: int, place: tuple[int | None, ...]) -> dict[str, Any]:
    """Validate one level of a pytree; `place` are the indices from the root, to find the keyword arguments."""
    if value == LEAF:
        return dict(LEAF)
    kind, context, children = (mapping(value, where).get(part) for part in LEAF)
    if depth > PYTREE_DEPTH or not isinstance(children, list) or not isinstance(context, str):
        raise RejectedProgram(where, "its pytree is not valid")
    if kind not in CONTAINERS and not _is_output_record(kind):
        raise RejectedProgram(
            where, f"inputs or outputs are in a {str(kind)[:80]!r}: only tuples, lists and dictionaries are supported"
        )
    try:
        keys = json.loads(context)
    except ValueError as error:
        raise RejectedProgram(where, "its pytree is not valid") from error
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


SCHEMA_MAJOR = 8
"""Major version of torch's export schema (torch/_export/serde/schema.py)."""

DEVICE = object_of(type=name, index=optional(integer))
_HINT = one_of(as_int=integer, as_bool=flag, as_float=number)
_SYMBOLIC = object_of(expr_str=check_expression, hint=optional(_HINT))
SYM_INT = one_of(as_expr=_SYMBOLIC, as_int=integer)
_SYM_FLOAT = one_of(as_expr=_SYMBOLIC, as_float=number)
_SYM_BOOL = one_of(as_expr=_SYMBOLIC, as_bool=flag)


def tensor_meta(size: Validator) -> Validator:
    return object_of(
        dtype=integer,
        sizes=list_of(size),
        requires_grad=flag,
        device=DEVICE,
        strides=list_of(size),
        storage_offset=size,
        layout=integer,
    )


_TENSOR = object_of(name=name)
_INT_ARGUMENT = one_of(as_name=name, as_int=integer)
_FLOAT_ARGUMENT = one_of(as_name=name, as_float=number)
_BOOL_ARGUMENT = one_of(as_name=name, as_bool=flag)
_OPTIONAL_TENSOR = one_of(as_tensor=_TENSOR, as_none=flag)


def _graph(value: Any, where: str) -> Any:
    return GRAPH(value, where)


ARGUMENT = one_of(
    as_none=flag,
    as_tensor=_TENSOR,
    as_tensors=list_of(_TENSOR),
    as_int=integer,
    as_ints=list_of(integer),
    as_float=number,
    as_floats=list_of(number),
    as_string=text,
    as_strings=list_of(text),
    as_sym_int=_INT_ARGUMENT,
    as_sym_ints=list_of(_INT_ARGUMENT),
    as_scalar_type=integer,
    as_memory_format=integer,
    as_layout=integer,
    as_device=DEVICE,
    as_bool=flag,
    as_bools=list_of(flag),
    as_sym_bool=_BOOL_ARGUMENT,
    as_sym_bools=list_of(_BOOL_ARGUMENT),
    as_graph=object_of(name=name, graph=_graph),
    as_optional_tensors=list_of(_OPTIONAL_TENSOR),
    as_operator=check_operator,
    as_sym_float=_FLOAT_ARGUMENT,
    as_sym_floats=list_of(_FLOAT_ARGUMENT),
    as_optional_tensor=_OPTIONAL_TENSOR,
    as_complex=object_of(real=number, imag=number),
    as_nested_tensors=list_of(list_of(_TENSOR)),
    as_int_lists=list_of(list_of(integer)),
    as_float_lists=list_of(list_of(number)),
)
"""The argument of an operator. Objects of custom classes and free dictionaries are not among them."""

MESSAGES = ("assert_msg", "msg", "message")
"""Arguments with messages for people, which may hold any text."""


def _named_argument(value: Any, where: str) -> Any:
    if isinstance(value, dict) and value.get("name") in MESSAGES and isinstance(value.get("arg"), dict):
        value = value | {"arg": {k: cleaned(v, where) if k == "as_string" else v for k, v in value["arg"].items()}}
    return _ARGUMENT_OF_NODE(value, where)


def _module_stack(value: Any, where: str) -> dict[str, str]:
    """Keep a single entry of a node's metadata, the module stack, which no reader evaluates.

    `source_fn_stack` is resolved by `getattr`; the others describe the exporter's own files.
    """
    stack = mapping(value, where).get("nn_module_stack")
    return {} if stack is None else {"nn_module_stack": cleaned(stack, f"{where}.nn_module_stack")}


_ARGUMENT_OF_NODE = object_of(name=unnamed_or(name), arg=ARGUMENT, kind=optional(integer))
NODE = object_of(
    target=check_operator,
    inputs=list_of(_named_argument),
    outputs=list_of(ARGUMENT),
    metadata=_module_stack,
    is_hop_single_tensor_return=optional(flag),
    name=optional(name),
)
GRAPH = object_of(
    inputs=list_of(ARGUMENT),
    outputs=list_of(ARGUMENT),
    nodes=list_of(NODE),
    tensor_values=mapping_of(name, tensor_meta(SYM_INT)),
    sym_int_values=mapping_of(name, SYM_INT),
    sym_bool_values=mapping_of(name, _SYM_BOOL),
    sym_float_values=mapping_of(name, _SYM_FLOAT),
    is_single_tensor_return=flag,
)

_CONSTANT = one_of(as_none=flag, as_int=integer, as_float=number, as_string=text, as_bool=flag)
_INPUT = one_of(
    user_input=object_of(arg=ARGUMENT),
    parameter=object_of(arg=_TENSOR, parameter_name=path),
    buffer=object_of(arg=_TENSOR, buffer_name=path, persistent=flag),
    tensor_constant=object_of(arg=_TENSOR, tensor_constant_name=path),
    constant_input=object_of(name=name, value=_CONSTANT),
)
_OUTPUT = one_of(
    user_output=object_of(arg=ARGUMENT),
    loss_output=object_of(arg=_TENSOR),
    buffer_mutation=object_of(arg=_TENSOR, buffer_name=path),
    parameter_mutation=object_of(arg=_TENSOR, parameter_name=path),
    gradient_to_parameter=object_of(arg=_TENSOR, parameter_name=path),
    gradient_to_user_input=object_of(arg=_TENSOR, user_input_name=name),
    user_input_mutation=object_of(arg=_TENSOR, user_input_name=name),
)

_CALL = object_of(
    inputs=list_of(ARGUMENT),
    outputs=list_of(ARGUMENT),
    in_spec=tree("inputs"),
    out_spec=tree("outputs"),
    forward_arg_names=optional(list_of(name)),
)


def _schema_version(value: Any, where: str) -> Any:
    version = object_of(major=integer, minor=integer)(value, where)
    if version.get("major") != SCHEMA_MAJOR:
        raise RejectedProgram(where, f"its schema version is {version.get('major')}, not {SCHEMA_MAJOR}")
    return version


PROGRAM = object_of(
    graph_module=object_of(
        graph=GRAPH,
        signature=object_of(input_specs=list_of(_INPUT), output_specs=list_of(_OUTPUT)),
        module_call_graph=list_of(object_of(fqn=unnamed_or(path), signature=optional(_CALL))),
        metadata=replaced_by({}),
        treespec_namedtuple_fields=replaced_by({}),
    ),
    opset_version=mapping_of(name, integer),
    range_constraints=mapping_of(symbol, object_of(min_val=optional(integer), max_val=optional(integer))),
    schema_version=_schema_version,
    verifiers=list_of(name),
    torch_version=text,
    guards_code=replaced_by([]),
)
"""`models/model.json`. Guards are Python text that torch executes: they are dropped, and inputs are still checked
against the program's own shapes."""

WEIGHTS = object_of(
    config=mapping_of(
        path,
        object_of(
            path_name=name, is_param=flag, use_pickle=flag, tensor_meta=optional(tensor_meta(one_of(as_int=integer)))
        ),
    )
)
"""`data/weights/model_weights_config.json` and that of the constants."""
