"""The grammar of an exported program's JSON: what may stand where, and nothing else.

torch's own reader evaluates parts of this text: symbolic expressions go through `eval`, operator names through
`getattr`, names of nodes and arguments into generated Python. Here every value is checked and copied into a new object,
so that what torch reads afterwards is what was checked. Written for schema version 8, that of torch 2.9 to 2.13.
"""

from __future__ import annotations

from typing import Any

from omgoptim.models.pt2_symbols import Refused
from omgoptim.models.pt2_trees import tree
from omgoptim.models.pt2_values import (
    Check,
    cleaned,
    each,
    expression,
    flag,
    integer,
    mapping,
    name,
    number,
    one_of,
    operator,
    optional,
    path,
    record,
    replaced_by,
    symbol,
    table,
    text,
    unnamed_or,
)

SCHEMA_MAJOR = 8

DEVICE = record(type=name, index=optional(integer))
_HINT = one_of(as_int=integer, as_bool=flag, as_float=number)
_SYMBOLIC = record(expr_str=expression, hint=optional(_HINT))
SYM_INT = one_of(as_expr=_SYMBOLIC, as_int=integer)
_SYM_FLOAT = one_of(as_expr=_SYMBOLIC, as_float=number)
_SYM_BOOL = one_of(as_expr=_SYMBOLIC, as_bool=flag)


def tensor_meta(size: Check) -> Check:
    return record(
        dtype=integer,
        sizes=each(size),
        requires_grad=flag,
        device=DEVICE,
        strides=each(size),
        storage_offset=size,
        layout=integer,
    )


_TENSOR = record(name=name)
_INT_ARGUMENT = one_of(as_name=name, as_int=integer)
_FLOAT_ARGUMENT = one_of(as_name=name, as_float=number)
_BOOL_ARGUMENT = one_of(as_name=name, as_bool=flag)
_OPTIONAL_TENSOR = one_of(as_tensor=_TENSOR, as_none=flag)


def _graph(value: Any, where: str) -> Any:
    return GRAPH(value, where)


ARGUMENT = one_of(
    as_none=flag,
    as_tensor=_TENSOR,
    as_tensors=each(_TENSOR),
    as_int=integer,
    as_ints=each(integer),
    as_float=number,
    as_floats=each(number),
    as_string=text,
    as_strings=each(text),
    as_sym_int=_INT_ARGUMENT,
    as_sym_ints=each(_INT_ARGUMENT),
    as_scalar_type=integer,
    as_memory_format=integer,
    as_layout=integer,
    as_device=DEVICE,
    as_bool=flag,
    as_bools=each(flag),
    as_sym_bool=_BOOL_ARGUMENT,
    as_sym_bools=each(_BOOL_ARGUMENT),
    as_graph=record(name=name, graph=_graph),
    as_optional_tensors=each(_OPTIONAL_TENSOR),
    as_operator=operator,
    as_sym_float=_FLOAT_ARGUMENT,
    as_sym_floats=each(_FLOAT_ARGUMENT),
    as_optional_tensor=_OPTIONAL_TENSOR,
    as_complex=record(real=number, imag=number),
    as_nested_tensors=each(each(_TENSOR)),
    as_int_lists=each(each(integer)),
    as_float_lists=each(each(number)),
)
"""The argument of an operator. Objects of custom classes and free dictionaries are not among them."""

MESSAGES = ("assert_msg", "msg", "message")


def _named_argument(value: Any, where: str) -> Any:
    if isinstance(value, dict) and value.get("name") in MESSAGES and isinstance(value.get("arg"), dict):
        value = value | {"arg": {k: cleaned(v, where) if k == "as_string" else v for k, v in value["arg"].items()}}
    return _ARGUMENT_OF_NODE(value, where)


def _module_stack(value: Any, where: str) -> dict[str, str]:
    """The one entry of a node's metadata that is kept: which modules it came from, which no reader evaluates.

    `source_fn_stack` is looked up by `getattr`, and the others are notes on the exporter's own files.
    """
    stack = mapping(value, where).get("nn_module_stack")
    return {} if stack is None else {"nn_module_stack": cleaned(stack, f"{where}.nn_module_stack")}


_ARGUMENT_OF_NODE = record(name=unnamed_or(name), arg=ARGUMENT, kind=optional(integer))
NODE = record(
    target=operator,
    inputs=each(_named_argument),
    outputs=each(ARGUMENT),
    metadata=_module_stack,
    is_hop_single_tensor_return=optional(flag),
    name=optional(name),
)
GRAPH = record(
    inputs=each(ARGUMENT),
    outputs=each(ARGUMENT),
    nodes=each(NODE),
    tensor_values=table(name, tensor_meta(SYM_INT)),
    sym_int_values=table(name, SYM_INT),
    sym_bool_values=table(name, _SYM_BOOL),
    sym_float_values=table(name, _SYM_FLOAT),
    is_single_tensor_return=flag,
)

_CONSTANT = one_of(as_none=flag, as_int=integer, as_float=number, as_string=text, as_bool=flag)
_INPUT = one_of(
    user_input=record(arg=ARGUMENT),
    parameter=record(arg=_TENSOR, parameter_name=path),
    buffer=record(arg=_TENSOR, buffer_name=path, persistent=flag),
    tensor_constant=record(arg=_TENSOR, tensor_constant_name=path),
    constant_input=record(name=name, value=_CONSTANT),
)
_OUTPUT = one_of(
    user_output=record(arg=ARGUMENT),
    loss_output=record(arg=_TENSOR),
    buffer_mutation=record(arg=_TENSOR, buffer_name=path),
    parameter_mutation=record(arg=_TENSOR, parameter_name=path),
    gradient_to_parameter=record(arg=_TENSOR, parameter_name=path),
    gradient_to_user_input=record(arg=_TENSOR, user_input_name=name),
    user_input_mutation=record(arg=_TENSOR, user_input_name=name),
)

_CALL = record(
    inputs=each(ARGUMENT),
    outputs=each(ARGUMENT),
    in_spec=tree("inputs"),
    out_spec=tree("outputs"),
    forward_arg_names=optional(each(name)),
)


def _schema_version(value: Any, where: str) -> Any:
    version = record(major=integer, minor=integer)(value, where)
    if version.get("major") != SCHEMA_MAJOR:
        raise Refused(where, f"it is of schema version {version.get('major')}, and {SCHEMA_MAJOR} is read")
    return version


PROGRAM = record(
    graph_module=record(
        graph=GRAPH,
        signature=record(input_specs=each(_INPUT), output_specs=each(_OUTPUT)),
        module_call_graph=each(record(fqn=unnamed_or(path), signature=optional(_CALL))),
        metadata=replaced_by({}),
        treespec_namedtuple_fields=replaced_by({}),
    ),
    opset_version=table(name, integer),
    range_constraints=table(symbol, record(min_val=optional(integer), max_val=optional(integer))),
    schema_version=_schema_version,
    verifiers=each(name),
    torch_version=text,
    guards_code=replaced_by([]),
)
"""`models/model.json`. Guards are Python text that torch executes: they are dropped, and inputs are still checked
against the program's own shapes."""

_STORED = tensor_meta(one_of(as_int=integer))
WEIGHTS = record(
    config=table(
        path,
        record(
            path_name=name, is_param=flag, use_pickle=flag, tensor_meta=optional(tensor_meta(one_of(as_int=integer)))
        ),
    )
)
"""`data/weights/model_weights_config.json` and that of the constants."""
