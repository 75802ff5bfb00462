"""External data files of an ONNX file, found and checked before any engine opens them.

An engine opens any path in the file. The paths are read here from the file's bytes, in the wire format of
protobuf, message by message: no weight is loaded, so that a measuring process can check without its memory growing.
Source: https://protobuf.dev/programming-guides/encoding and the field numbers of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from omgoptim.errors import ModelError

MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""The fields of each message that a tensor can be in."""
MAX_DEPTH = 200
"""Limit of nested messages, above protobuf's own default of 100."""
MAX_TEXT = 10_000
"""Limit of a key or location, in bytes: a path has at most 4,096 on Linux."""
TEXT, VARINT, EIGHT_BYTES, FOUR_BYTES = 2, 0, 1, 5
"""Wire types of protobuf; `TEXT` is any value with a length before it, messages too."""


class MalformedProtobuf(ValueError):
    """The bytes are not a protobuf message."""


def external_data(program: Path) -> set[str]:
    """Return the locations, relative to the program's folder, of the files that hold its weights.

    Raises:
        ModelError: one of them is absolute, is outside the folder, or is not a regular file.
        MalformedProtobuf: the bytes cannot be read as an ONNX model.
        OSError: there is no such file.
    """
    locations: set[str] = set()
    with program.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        for key, value in _entries(file, size, "model", 0):
            if key == "location":
                locations.add(value)
    for location in locations:
        _refuse_outside(program, location)
    return locations


def _refuse_outside(program: Path, location: str) -> None:
    folder = program.resolve().parent
    path = Path(location)
    try:
        target = (folder / path).resolve()
        inside = target.is_relative_to(folder) and target != folder
        plain = not target.exists() or target.is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a name, holds a NUL, a circle of links
        inside = plain = False
    special = set(location) & set("\\:*")  # Windows paths; ONNX Runtime takes `*/_ORT_MEM_ADDR_/*` for a pointer
    if path.is_absolute() or ".." in path.parts or special or not inside or not plain:
        raise ModelError(
            f"{program.name} is not opened: its external data lies outside its folder",
            f"a tensor's external data is at {location[:200]!r}",
            "save the model with its weights in one file, or in a file beside it: "
            "onnx.save_model(…, save_as_external_data=True, location='model.onnx.data')",
        )


def _entries(file: BinaryIO, end: int, message: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the external data entries of a message that ends at byte `end`; the file is at its beginning."""
    if depth > MAX_DEPTH:
        raise MalformedProtobuf("its graphs are nested too deep")
    inner = MESSAGES[message]
    while file.tell() < end:
        field, wire = divmod(_varint(file), 8)
        if wire == VARINT:
            _varint(file)
        elif wire in (EIGHT_BYTES, FOUR_BYTES):
            file.seek(8 if wire == EIGHT_BYTES else 4, 1)
        elif wire == TEXT:
            length = _varint(file)
            after = file.tell() + length
            if after > end:
                raise MalformedProtobuf("it is truncated")
            kind = inner.get(field)
            if kind == "entry":
                yield _entry(file, after)
            elif kind is not None:
                yield from _entries(file, after, kind, depth + 1)
            file.seek(after)
        else:
            raise MalformedProtobuf("it has a field that ONNX models do not have")
    if file.tell() != end:
        raise MalformedProtobuf("it is truncated")


def _entry(file: BinaryIO, end: int) -> tuple[str, str]:
    """Read a pair of texts: field 1 is the key, field 2 the value; as everywhere in protobuf, the last one counts."""
    pair = {1: "", 2: ""}
    while file.tell() < end:
        field, wire = divmod(_varint(file), 8)
        length = _varint(file)
        if wire != TEXT or file.tell() + length > end or length > MAX_TEXT:
            raise MalformedProtobuf("the location of a tensor's external data cannot be read")
        pair[field] = file.read(length).decode("utf-8", "replace")
    return pair[1], pair[2]


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise MalformedProtobuf("it is truncated")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise MalformedProtobuf("it has an unterminated varint")
