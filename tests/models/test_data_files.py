"""Data files: their headers are checked before any array is read."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from omgoptim import hardware
from omgoptim.errors import DataError
from omgoptim.models.data import read_arrays


def header(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


def written(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
    return path


def test_a_header_that_claims_more_than_its_entry_holds_is_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not match its header") as error:
        read_arrays(written(tmp_path / "d.npz", header((48, 2**30), b"\0" * 64)))
    assert "206,158,430,208 bytes" in error.value.why  # 192 GiB


def test_arrays_that_unpack_to_more_than_memory_are_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "d.npz", header((2**18,), b"\0" * 2**20))
    assert path.stat().st_size < 2**13
    assert len(read_arrays(path)["x"]) == 2**18
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**19}))
    with pytest.raises(DataError, match=r"reading data d\.npz does not fit into memory"):
        read_arrays(path)


def test_an_entry_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_arrays(written(tmp_path / "d.npz", b"no array"))
