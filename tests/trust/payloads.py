"""Harmless payloads: code that, if anything ever runs it, does nothing but write a mark file.

A test puts one where a hostile file would have its own, lets omgoptim open the file, and asserts that the mark is
absent. A test in `test_files.py` shows that the pickles do write their mark when they are opened.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def MARK_CODE(mark: Path) -> str:
    """One Python expression, on one line, that writes `mark`; it gives the number of bytes written."""
    return f"__import__('pathlib').Path({str(mark)!r}).write_text('ran')"


def mark_command(mark: Path) -> str:
    """A shell command that writes `mark`."""
    return f"echo ran > '{mark}'"


def mark_module(mark: Path) -> str:
    """The text of a Python file that writes `mark` when it is imported, and holds a `Net` and a `load`."""
    return (
        f"{MARK_CODE(mark)}\n"
        "from torch import nn\n\n"
        "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(3, 2)\n\n"
        "def load(split): return []\n"
    )


class Marking:
    """An object whose pickle writes a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, (MARK_CODE(self.mark),)


def marking_pickle(mark: Path) -> bytes:
    """A bare pickle (REDUCE) that writes `mark` when it is opened."""
    return pickle.dumps(Marking(mark), protocol=2)


def marking_instruction(mark: Path, kind: str) -> bytes:
    """A bare pickle that reaches `eval` in another way than REDUCE at its top.

    Args:
        kind: `inst` and `obj` are two older instructions that call; `build` sets an object's `__setstate__` to
            `eval` and then its state; `nested` hides a REDUCE deep inside a training checkpoint.
    """
    code = repr(MARK_CODE(mark)).encode()
    if kind == "inst":
        return b"(S" + code + b"\nibuiltins\neval\n."
    if kind == "obj":
        return b"(cbuiltins\neval\nS" + code + b"\no."
    if kind == "build":  # state is set attribute by attribute: a UserDict's __setstate__ becomes eval, then runs
        return b"ccollections\nUserDict\n)\x81}S'__setstate__'\ncbuiltins\neval\nsbS" + code + b"\nb."
    if kind == "nested":
        return pickle.dumps({"state_dict": {"fc.weight": [1, {"deep": (Marking(mark),)}]}}, protocol=2)
    raise ValueError(kind)


def marking_checkpoint(mark: Path, state: Mapping[str, Any] | None = None, *, legacy: bool = False) -> bytes:
    """What `torch.save` writes of a state dict that carries the payload beside its weights."""
    import torch

    buffer = io.BytesIO()
    saved = {"state_dict": dict(state or {}), "hyper_parameters": Marking(mark)}
    torch.save(saved, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def marking_npz(mark: Path) -> bytes:
    """An .npz with one array of objects, which numpy unpickles when it is allowed to."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([Marking(mark)], dtype=object))
    return buffer.getvalue()
