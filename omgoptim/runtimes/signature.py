"""Signature of a model: names, dtypes and shapes of its inputs, and the structure of its outputs. No torch.

A batch is a mapping of input name to array, everywhere in omgoptim. A signature turns it into the positional and
keyword arguments of the original `forward`, and turns the flat list of output arrays back into what `forward` returns.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

Array = TypeVar("Array")

BATCH = "batch"
"""Name of the dynamic batch dimension."""


@dataclass(frozen=True, slots=True)
class InputTensor:
    """An input: `shape` holds sizes, or the names of dynamic dimensions (`"batch"`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    keyword: bool
    """Passed to `forward` by name (a dict batch) rather than by position."""


@dataclass(frozen=True, slots=True)
class Signature:
    """The inputs in call order, and the outputs' structure as `structure_of` writes it."""

    inputs: tuple[InputTensor, ...]
    outputs: Any

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs in order."""
        return [tensor.name for tensor in self.inputs]

    @property
    def dtypes(self) -> dict[str, str]:
        """Map input name to dtype."""
        return {tensor.name: tensor.dtype for tensor in self.inputs}

    @property
    def output_names(self) -> list[str]:
        """Return one unique name per output tensor, different from the inputs' names, as ONNX needs."""
        used = set(self.input_names)
        names = []
        for name in leaf_names(self.outputs):
            while name in used:
                name += "_out"
            used.add(name)
            names.append(name)
        return names

    @property
    def batch(self) -> int | None:
        """Return the only batch size that it accepts; None if the batch is dynamic."""
        return next((t.shape[0] for t in self.inputs if t.shape and isinstance(t.shape[0], int)), None)

    def at_batch(self, size: int | str) -> Signature:
        """Return the signature with this batch size, or with `BATCH`, a dynamic one."""
        inputs = tuple(replace(tensor, shape=(size, *tensor.shape[1:])) for tensor in self.inputs)
        return replace(self, inputs=inputs)

    def to_call(self, batch: Mapping[str, Array]) -> tuple[tuple[Array, ...], dict[str, Array]]:
        """Return the positional and keyword arguments of the original forward for a batch."""
        args = tuple(batch[tensor.name] for tensor in self.inputs if not tensor.keyword)
        kwargs = {tensor.name: batch[tensor.name] for tensor in self.inputs if tensor.keyword}
        return args, kwargs

    def to_json(self) -> dict[str, Any]:
        """Return the signature as plain JSON values."""
        return {
            "inputs": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "keyword": t.keyword} for t in self.inputs
            ],
            "outputs": self.outputs,
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> Signature:
        """Create the signature from the result of `to_json`."""
        inputs = tuple(InputTensor(t["name"], t["dtype"], tuple(t["shape"]), t["keyword"]) for t in record["inputs"])
        return Signature(inputs, record["outputs"])


class Outputs(dict[str, Any]):
    """A dict of outputs that also reads as attributes and by position, like Hugging Face's outputs."""

    def __missing__(self, key: object) -> Any:
        if isinstance(key, int):
            return [value for value in self.values() if value is not None][key]
        raise KeyError(key)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def structure_of(value: Any) -> Any:
    """Return the JSON structure of a forward's return value.

    A tensor is `"tensor"`, None is None; tuples, lists, mappings, named tuples and dataclasses nest as
    `{"tuple": [...]}`, `{"list": [...]}`, `{"dict": {...}}`, `{"named_tuple": {...}}` and `{"dataclass": {...}}`.

    Raises:
        TypeError: a leaf that is neither a tensor nor None.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):  # Hugging Face's ModelOutput is one
        return {"dict": {str(key): structure_of(item) for key, item in value.items()}}
    for kind, found in (("named_tuple", named_tuple_fields(value)), ("dataclass", dataclass_fields(value))):
        if found is not None:
            return {kind: {name: structure_of(item) for name, item in found.items()}}
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [structure_of(item) for item in value]}
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return "tensor"
    raise TypeError(f"forward returned a {type(value).__name__}, not a tensor, tuple, list or dict of tensors")


def flatten(value: Any) -> list[Any]:
    """Return the tensors in a forward's return value, in the order of `structure_of`."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in flatten(item)]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in flatten(item)]
    found = dataclass_fields(value)
    return [value] if found is None else [leaf for item in found.values() for leaf in flatten(item)]


def named_tuple_fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of a named tuple; None of anything else."""
    names = getattr(type(value), "_fields", None)
    return dict(zip(names, value, strict=True)) if isinstance(value, tuple) and names is not None else None


def dataclass_fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of an instance of a dataclass; None of anything else."""
    if not is_dataclass(value) or isinstance(value, type):
        return None
    return {field.name: getattr(value, field.name) for field in fields(value)}


def holds_class(structure: Any) -> bool:
    """Return whether a structure holds a dataclass or a named tuple, which torch.export does not accept or store."""
    if not isinstance(structure, Mapping):
        return False
    ((kind, items),) = structure.items()
    parts = items.values() if isinstance(items, Mapping) else items
    return kind in ("dataclass", "named_tuple") or any(holds_class(part) for part in parts)


def unflatten(structure: Any, leaves: Sequence[Any]) -> Any:
    """Put `leaves` back into `structure`, the inverse of `flatten`."""
    remaining = iter(leaves)

    def build(node: Any) -> Any:
        if node is None:
            return None
        if node == "tensor":
            return next(remaining)
        ((kind, items),) = node.items()
        if kind == "named_tuple":
            return namedtuple("Outputs", items)(*(build(item) for item in items.values()))
        if kind in ("dict", "dataclass"):
            return Outputs({key: build(item) for key, item in items.items()})
        return (tuple if kind == "tuple" else list)(build(item) for item in items)

    return build(structure)


def leaf_names(structure: Any, prefix: str = "") -> list[str]:
    """Return one name per output tensor: `output` for a single one, else the keys and positions of its path."""
    if structure is None:
        return []
    if structure == "tensor":
        return [prefix or "output"]
    ((_, items),) = structure.items()
    pairs = items.items() if isinstance(items, Mapping) else enumerate(items)
    names = [name for key, item in pairs for name in leaf_names(item, f"{prefix}_{key}" if prefix else str(key))]
    return [f"output_{name}" if name.isdigit() else name for name in names]
