"""Named arrays of a data file, `.npz` or `.safetensors`, read only after their headers were checked."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import DataError
from omgoptim.models.memory_check import refuse_beyond_memory


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a file by name; bfloat16 as float32.

    Raises:
        DataError: it is damaged, holds Python objects, claims more than its entries hold, or does not fit into memory.
    """
    if path.suffix == ".npz":
        try:
            refuse_beyond_memory(_claimed_bytes(path), f"reading data {path.name}", kind=DataError)
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"data {path.name} cannot be read", str(error)) from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        refuse_beyond_memory(path.stat().st_size, f"reading data {path.name}", kind=DataError)
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"data {path.name} cannot be read", str(error)) from error
    import torch

    return {name: (t.float() if t.dtype is torch.bfloat16 else t).numpy() for name, t in tensors.items()}


def _claimed_bytes(path: Path) -> int:
    """Return the bytes of all arrays of an .npz file, as the headers of its entries declare them.

    Raises:
        DataError: an entry is not an array, holds objects, or is shorter than its header says.
    """
    total = 0
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            name = entry.filename.removesuffix(".npy")
            if dtype.hasobject:
                raise DataError(
                    f"array '{name}' of {path.name} holds Python objects",
                    "reading them would run code: they are pickled",
                    "save arrays of numbers: np.savez('data.npz', x=np.asarray(rows, dtype=np.float32))",
                )
            size = prod(shape) * dtype.itemsize
            if size > entry.file_size:
                raise DataError(
                    f"array '{name}' of {path.name} does not match its header",
                    f"a shape of {shape} in {dtype} takes {size:,} bytes, and the entry has {entry.file_size:,}",
                    "write the file again",
                )
            total += size
    return total
