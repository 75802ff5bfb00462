"""Reading of a `.pt2` file without running code from it.

`torch.export.load` unpickles a file's example inputs, its tensor subclasses and its custom objects, and evaluates parts
of its text. So torch never reads the file itself: every member is read once, checked, and written into a new
archive in memory, which torch then loads. Weights are copied as bytes; the program is rebuilt from its checked values
(`schema`); example inputs are checked with `weights_only=True` and omitted, since no computation needs them.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omgoptim.errors import ModelError
from omgoptim.models._pt2.schema import PROGRAM, WEIGHTS
from omgoptim.models._pt2.symbols import RejectedProgram
from omgoptim.models._pt2.validators import Validator

ALTERNATIVES = (
    "give the model's source (file.py:callable) and its weights as a checkpoint, or the model as ONNX; "
    "or, if it is your own program, export it again with torch.export.save"
)
ROOT = "model"
"""Folder of the archive, as torch.export.save names it."""
MODEL, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
CONFIGS = {"data/weights/": "data/weights/model_weights_config.json"} | {
    "data/constants/": "data/constants/model_constants_config.json"
}
TENSOR_FILE = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,9}")
PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/[a-z_]+|version|\.format_version|\.storage_alignment"
)
"""Members of a few bytes each that say how the archive is written."""
FORMAT, VERSION = ("archive_format", b"pt2"), ("archive_version", b"0")
MAX_MEMBERS = 1_000_000
"""Limit of the archive's listing, far above a model's tensors, against memory exhaustion."""
MAX_JSON_BYTES = 2**29
"""Limit of the program's text, 512 MiB, against memory exhaustion."""
ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2} | {
    **dict.fromkeys(range(29, 34), 1),
    34: 4,
    35: 8,
}
"""Bytes of one number, by the schema's code of its type."""


def open_pt2(path: Path) -> nn.Module:
    """Return the module of a program that `torch.export.save` wrote.

    Raises:
        ModelError: the file is damaged, is of another format, or would run code when torch opens it.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            checked = _checked_copy(archive)
    except RejectedProgram as refused:
        raise ModelError(
            f"{path.name} is not opened: it contains more than a model's tensors and operators",
            f"{refused.where}: {refused.why}",
            ALTERNATIVES,
        ) from refused
    except RecursionError as error:
        raise ModelError(f"{path.name} is not opened", "a part of it is nested too deep", ALTERNATIVES) from error
    except KeyError as error:  # fields may be absent where torch writes them only sometimes
        raise _unreadable(path, ValueError(f"it lacks the entry {error}")) from error
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise _unreadable(path, error) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module: nn.Module = torch.export.load(checked).module()
    except Exception as error:  # torch.export raises kinds of its own on a program that does not fit together
        raise _unreadable(path, error) from error
    return module


def _unreadable(path: Path, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines()
    return ModelError(f"{path.name} cannot be opened", lines[0] if lines else type(error).__name__, ALTERNATIVES)


def _checked_copy(archive: zipfile.ZipFile) -> io.BytesIO:
    """Write a new archive of the same program from the checked parts."""
    members = _members(archive)
    _refuse_other_formats(archive, members)
    program = _json(archive, members, MODEL, PROGRAM)
    configs = {folder: _json(archive, members, file, WEIGHTS) for folder, file in CONFIGS.items()}
    for folder, config in configs.items():
        _check_tensors(config["config"], folder, members)
    if INPUTS in members:
        _check_example_inputs(archive.read(members[INPUTS]))
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:

        def write(name: str, data: bytes) -> None:
            target.writestr(f"{ROOT}/{name}", data)

        for name, member in members.items():
            if TENSOR_FILE.fullmatch(name):
                write(name, archive.read(member))
        write(MODEL, json.dumps(program).encode())
        for folder, config in configs.items():
            write(CONFIGS[folder], json.dumps(config).encode())
        write(INPUTS, b"")
        for name, data in (FORMAT, VERSION, (".data/version", b"6\n"), ("byteorder", b"little")):
            write(name, data)
    copy.seek(0)
    return copy


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name within the archive's one folder: unique, uncompressed, inside the file."""
    found: dict[str, zipfile.ZipInfo] = {}
    listed = archive.infolist()
    if not listed or len(listed) > MAX_MEMBERS:
        raise RejectedProgram("the archive", f"it has {len(listed)} entries; 1 to {MAX_MEMBERS} are allowed")
    folder = listed[0].filename.partition("/")[0]
    for member in listed:
        root, _, name = member.filename.partition("/")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise RejectedProgram(_short(member.filename), "it is compressed, which torch.export.save never does")
        if not name or root != folder or ".." in name.split("/") or "\\" in name or not name.isprintable():
            if member.filename == "version" or member.filename.startswith("serialized_"):
                raise RejectedProgram(
                    member.filename, "the file has the format of torch before 2.9, which stores weights as pickles"
                )
            raise RejectedProgram(_short(member.filename), "exported programs have no entry of this name")
        if name in found:
            raise RejectedProgram(_short(name), "it occurs twice")
        found[name] = member
    size = archive.fp.seek(0, io.SEEK_END) if archive.fp is not None else 0
    if sum(member.file_size for member in listed) > size:
        raise RejectedProgram("the archive", "its entries overlap")
    return found


def _refuse_other_formats(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> None:
    """Refuse compiled code, objects, pickled weights and several programs."""
    for name, member in members.items():
        if name.startswith(("data/weights/", "data/constants/")):
            if not TENSOR_FILE.fullmatch(name) and name not in CONFIGS.values():
                raise RejectedProgram(
                    _short(name), "it is a pickle or an object of a custom class; only plain tensors are allowed"
                )
        elif name.startswith("data/aotinductor/"):
            raise RejectedProgram(_short(name), "it is compiled code")
        elif PLAIN.fullmatch(name):
            if member.file_size > 1000:
                raise RejectedProgram(_short(name), "it is too long")
        elif name not in (MODEL, INPUTS) and not name.startswith("extra/"):
            raise RejectedProgram(_short(name), "torch.export.save writes no entry of this name")
    for name, value in (FORMAT, VERSION):
        if name not in members:
            raise RejectedProgram(name, "it is missing: torch.export.save of torch 2.9 or later did not write the file")
        if archive.read(members[name]).strip() != value:
            raise RejectedProgram(name, f"it differs from the supported {value.decode()!r}")
    if "byteorder" in members and archive.read(members["byteorder"]).strip() != b"little":
        raise RejectedProgram("byteorder", "this byte order is not supported")


def _json(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str, check: Validator) -> dict[str, Any]:
    if name not in members:
        raise RejectedProgram(name, "it is missing")
    if members[name].file_size > MAX_JSON_BYTES:
        raise RejectedProgram(name, f"it is too large ({members[name].file_size} bytes)")
    try:
        value = json.loads(archive.read(members[name]).decode())
    except ValueError as error:
        raise RejectedProgram(name, "it is not JSON") from error
    checked: dict[str, Any] = check(value, name)
    return checked


def _check_tensors(config: dict[str, Any], folder: str, members: dict[str, zipfile.ZipInfo]) -> None:
    """Refuse pickled tensors, and tensors whose declared shape lies outside of their bytes."""
    for name, entry in config.items():
        where = _short(f"{CONFIGS[folder]}[{name!r}]")
        meta = entry.get("tensor_meta")
        if entry.get("use_pickle") is not False or meta is None:
            raise RejectedProgram(where, "it is a pickle; only plain tensors are allowed")
        file = folder + entry.get("path_name", "")
        if not TENSOR_FILE.fullmatch(file) or file not in members:
            raise RejectedProgram(where, f"its file {file[:80]!r} is missing")
        sizes = [size["as_int"] for size in meta["sizes"]]
        strides = [stride["as_int"] for stride in meta["strides"]]
        first = meta["storage_offset"]["as_int"]
        if len(sizes) != len(strides) or min([first, *sizes, *strides]) < 0:
            raise RejectedProgram(where, "its shape is not valid")
        numbers = 0 if 0 in sizes else 1 + first + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if numbers * ITEM_BYTES.get(meta["dtype"], 2**40) > members[file].file_size:
            raise RejectedProgram(where, f"its shape {sizes[:8]} needs more than its {members[file].file_size} bytes")


def _check_example_inputs(data: bytes) -> None:
    """Refuse example inputs other than tensors and plain values; they are not kept.

    A program runs without them, but a pickle with calls in it marks the whole file as unsafe.
    """
    if not data:
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as inner:
            if any(member.file_size != member.compress_size for member in inner.infolist()):
                raise RejectedProgram(INPUTS, "an entry is compressed, which torch.save never does")
            if sum(member.file_size for member in inner.infolist()) > len(data):
                raise RejectedProgram(INPUTS, "its entries overlap")
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except RejectedProgram:
        raise
    except pickle.UnpicklingError as error:
        raise RejectedProgram(
            INPUTS, "the example inputs are a pickle of more than tensors, and opening it would run code"
        ) from error
    except Exception as error:  # damaged in any way: torch's reader raises kinds of its own
        raise RejectedProgram(INPUTS, "the example inputs cannot be read") from error


def _short(name: str) -> str:
    return repr(name)[1:-1][:200]
