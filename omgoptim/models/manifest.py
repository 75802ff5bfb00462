"""Manifest of an artifact and its verification: files, their sha256, and the user who saved it. No torch.

Nothing that a manifest names leaves the artifact's folder, and nothing in it is a link; only the way to the folder may
be one. A manifest is untrusted: everything in it is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from omgoptim.errors import ArtifactError
from omgoptim.models.output_check import TOLERANCE
from omgoptim.models.security.file_integrity import HMAC_FIELD, is_signed, read_regular_file, sha256
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from omgoptim.reports import MacsCheck

FORMAT = 1
"""Version of the manifest's format; other versions are refused."""
MANIFEST, PROGRAM, PROGRAM2, LOWERED, WEIGHTS, RECIPE = (
    "manifest.json",
    "model.onnx",
    "model.pt2",
    "model.pte",
    "weights.safetensors",
    "recipe.json",
)
MAX_JSON_BYTES = 16 * 2**20
"""Limit of a JSON file from an untrusted folder: 16 MiB, far above what omgoptim writes."""
MAX_FILES = 1000
"""Limit of the files in an artifact, which has fewer than ten and the parts of external data."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Description of an artifact."""

    runtime: str
    precision: str
    signature: Signature
    params: int | None = None
    nonzero_params: int | None = None
    macs: int | None = None
    macs_check: MacsCheck | None = None
    lineage: tuple[str, ...] = ()
    device: str = "cpu"
    mixed_precision: bool = False
    """A layer in float stands between quantized ones: ONNX Runtime would quantize it as well when it opens the file."""
    dense_size_bytes: int | None = None
    """`size_bytes` if every zero were stored as a number; None where nothing is packed."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every file but the manifest itself, by its path in the folder: `bytes`, `sha256`, and `beside` of those that the
    engine does not open."""
    made_here: bool = field(default=False, compare=False)
    """This user's omgoptim wrote the manifest, by its HMAC; read, never written."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        return {
            "format": FORMAT,
            "runtime": self.runtime,
            "precision": self.precision,
            "device": self.device,
            "signature": self.signature.to_json(),
            "params": self.params,
            "nonzero_params": self.nonzero_params,
            "macs": self.macs,
            "macs_check": self.macs_check.model_dump() if self.macs_check else None,
            "lineage": list(self.lineage),
            "mixed_precision": self.mixed_precision,
            "dense_size_bytes": self.dense_size_bytes,
            "files": self.files,
        }

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read the manifest of an artifact folder.

        Raises:
            ArtifactError: there is none, or it is of another format.
        """
        try:
            record = read_json(folder / MANIFEST)
            made_here = is_signed("artifact", record)
            record.pop(HMAC_FIELD, None)
            if record.pop("format") != FORMAT:
                raise ArtifactError(f"artifact {folder} was written by another version of omgoptim")
            signature = Signature.from_json(record.pop("signature"))
            check = record.pop("macs_check")
            macs_check = None
            if check:
                from omgoptim.reports import MacsCheck  # pydantic, which a target lacks; there a manifest has no counts

                macs_check = MacsCheck.model_validate(check)
            lineage = tuple(record.pop("lineage"))
            record.pop("made_here", None)
            manifest = Manifest(
                signature=signature, lineage=lineage, macs_check=macs_check, made_here=made_here, **record
            )
            _refuse_other_types(manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{folder} is not an artifact", f"{MANIFEST} cannot be read: {error}") from error
        if manifest.runtime not in ENGINES or manifest.precision not in TOLERANCE:
            raise ArtifactError(
                f"artifact {folder} is damaged or of another version of omgoptim",
                f"{MANIFEST} has runtime '{manifest.runtime}' and precision '{manifest.precision}'",
            )
        return manifest

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the files that its engine opens: no manifest, no output check, no additional files."""
        return sum(self.files[name]["bytes"] for name in self.size_files)

    @property
    def size_files(self) -> list[str]:
        """Return the names of the files that `size_bytes` counts."""
        return [name for name, entry in self.files.items() if not entry.get("beside")]


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in an untrusted JSON file.

    Raises:
        ValueError: it is not a regular file, too large, nested too deep, or holds no object.
        OSError: it cannot be read.
    """
    return json_object(read_regular_file(path, MAX_JSON_BYTES))


def json_object(text: bytes) -> dict[str, Any]:
    """Parse the object in an untrusted JSON text.

    Raises:
        ValueError: it is not JSON, nested too deep, or holds no object.
    """
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    return record


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded sha256.

    Raises:
        ArtifactError: a file is missing, was changed, is a link or lies outside the folder.
    """
    for name, entry in manifest.files.items():
        path = file_inside(folder, name)
        if path is None:
            raise ArtifactError(f"artifact {folder} lacks {name}", "the manifest lists it", "run the compression again")
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise ArtifactError(
                f"artifact {folder} is damaged",
                f"{name} is not the file that was saved (its sha256 differs)",
                "run the compression again, or restore the file",
            )


def listed_file(folder: Path, manifest: Manifest, name: str) -> Path:
    """Return a file of the artifact that is listed, with its sha256, in the manifest.

    Raises:
        ArtifactError: the manifest does not list it, or it is not a file inside the folder.
    """
    path = file_inside(folder, name) if name in manifest.files else None
    if path is None:
        raise ArtifactError(f"artifact {folder} is damaged", f"{MANIFEST} lists no {name}", "run the compression again")
    return path


def file_inside(folder: Path, name: str) -> Path | None:
    """Return the regular file of that relative path inside the folder; None if there is nothing of that name.

    Raises:
        ArtifactError: the path is outside the folder, or a part of it is a link or not a regular file.
    """
    parts = PurePosixPath(name).parts
    is_plain = name == "/".join(parts) and not set(name) & set("\\:\0\n\r")
    if not is_plain or not parts or ".." in parts or PurePosixPath(name).is_absolute():
        raise _foreign_file(folder, f"{name[:200]!r} is not a path inside the folder")
    path = folder
    for index, part in enumerate(parts):
        path = path / part
        try:
            kind = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # too long
            raise _foreign_file(folder, f"{name[:200]!r}: {error.strerror}") from error
        has_type = stat.S_ISREG if index == len(parts) - 1 else stat.S_ISDIR
        if not has_type(kind):
            raise _foreign_file(folder, f"{name[:200]!r} is a link or not a regular file")
    return path


def sha256_of(content: bytes) -> str:
    """Return the sha256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _refuse_other_types(manifest: Manifest) -> None:
    """Raise a TypeError if a field of a manifest has another type than omgoptim writes."""
    counts = (manifest.params, manifest.nonzero_params, manifest.macs, manifest.dense_size_bytes)
    texts = (manifest.runtime, manifest.precision, manifest.device, *manifest.lineage)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("runtime, precision, device and lineage must be strings")
    if not isinstance(manifest.mixed_precision, bool):
        raise TypeError("mixed_precision must be true or false")
    if not all(count is None or _is_count(count) for count in counts):
        raise TypeError("a count is not an integer")
    for tensor in manifest.signature.inputs:
        sizes = all(isinstance(size, str) or _is_count(size) for size in tensor.shape)
        if not (isinstance(tensor.name, str) and isinstance(tensor.keyword, bool) and sizes):
            raise TypeError("an input of the signature is malformed")
        if tensor.dtype != "bfloat16" and np.dtype(tensor.dtype).kind not in "fiub":
            raise TypeError("an input of the signature has no numeric dtype")
    _ = manifest.signature.output_names  # walks the structure of the outputs
    if not isinstance(manifest.files, dict) or len(manifest.files) > MAX_FILES:
        raise TypeError(f"files must be an object with at most {MAX_FILES} entries")
    for entry in manifest.files.values():
        if not (isinstance(entry, dict) and _is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)):
            raise TypeError("an entry of files needs its size in bytes and its sha256")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _foreign_file(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"artifact {folder} refers to a file outside itself",
        f"{why}; every file of an artifact is a regular file inside its folder",
        "use an artifact that omgoptim wrote",
    )
