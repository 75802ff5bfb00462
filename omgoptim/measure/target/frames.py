"""Frames of the protocol between client and agent: a JSON object on a line, then its payload, if it has one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, BinaryIO

MAX_LINE_BYTES = 64 * 2**20
"""Limit of a line: far above an answer with the times of every node."""
BLOCK = 2**20
"""Bytes that are read or written at once: the memory of a transfer."""
SIZE = "payload_bytes"
"""Key of a payload's length."""


def write_frame(stream: BinaryIO, record: dict[str, Any], payload: Path | None = None) -> None:
    """Write a frame, with the content of a file as its payload."""
    if payload is None:
        stream.write(json.dumps(record).encode() + b"\n")
    else:
        with payload.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            stream.write(json.dumps(record | {SIZE: size}).encode() + b"\n")
            shutil.copyfileobj(file, stream, BLOCK)
    stream.flush()


def read_frame(stream: BinaryIO, scratch: Path) -> dict[str, Any] | None:
    """Read a frame; None at the end of the stream, also in the middle of a frame.

    A payload goes to the file `scratch`, named by `payload` in the result; if it cannot be written, `failure` says why.

    Raises:
        ValueError: it is not a frame.
        OSError: the stream cannot be read.
    """
    line = stream.readline(MAX_LINE_BYTES)
    if not line.endswith(b"\n"):
        return None
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    left = int(record.pop(SIZE, -1))
    if left < 0:
        return record
    failure: OSError | None = None
    file = scratch.open("wb")
    try:
        while left:
            block = stream.read(min(left, BLOCK))
            if not block:
                return None
            left -= len(block)
            try:
                file.write(block)
            except OSError as error:  # a full disk: what follows on the stream is still a frame
                failure = failure or error
    finally:
        try:
            file.close()
        except OSError as error:
            failure = failure or error
    return record | ({"payload": str(scratch)} if failure is None else {"payload": None, "failure": str(failure)})
