"""An artifact: one folder that holds everything needed to run a model, and that proves itself when it is opened.

`manifest.json` says which engine runs it, how it is called, and the sha256 of every file. `check.npz` holds a small
random batch and what the model gave for it before it was saved. A program (`model.onnx`) stands alone; a module is its
`recipe.json` (how the user's code builds it) and `weights.safetensors`, where weights with many zeros are packed
(`sparse.py`), or a `.pt2` file. Never a pickle. Beside a module that was reshaped lies the same model as ONNX and .pt2;
an artifact's size is that of the files that its engine opens.

This module imports no torch: an ONNX artifact opens without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import ArtifactError, OmgoptimError
from omgoptim.models.check import CHECK, write_check
from omgoptim.models.check import TOLERANCE as TOLERANCE
from omgoptim.models.check import Check as Check
from omgoptim.models.check import max_difference as max_difference
from omgoptim.models.check import verify_outputs as verify_outputs
from omgoptim.reports import MacsCheck
from omgoptim.runtimes import ENGINES, Session, Settings, engine_named
from omgoptim.runtimes.external_data import external_data
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from omgoptim.models.source import Recipe

FORMAT = 1
MANIFEST, PROGRAM, PROGRAM2, WEIGHTS, RECIPE = (
    "manifest.json",
    "model.onnx",
    "model.pt2",
    "weights.safetensors",
    "recipe.json",
)
PACKABLE = ("float32", "float16", "bfloat16")
"""Precisions whose weights may be packed; int8 layers have a form of their own."""
WORTH_PACKING = 0.02
"""Smallest fraction of the weights' bytes that packing has to save: every reader has to unpack them."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact says about itself."""

    runtime: str
    precision: str
    signature: Signature
    params: int | None = None
    nonzero_params: int | None = None
    macs: int | None = None
    macs_check: MacsCheck | None = None
    lineage: tuple[str, ...] = ()
    device: str = "cpu"
    dense_size_bytes: int | None = None
    """`size_bytes` if every zero were stored as a number; None where nothing is packed."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
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
            "dense_size_bytes": self.dense_size_bytes,
            "files": self.files,
        }

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of an artifact folder.

        Raises:
            ArtifactError: there is none, or it is of another format.
        """
        try:
            record = json.loads((folder / MANIFEST).read_text())
            if record.pop("format") != FORMAT:
                raise ArtifactError(f"artifact {folder} was written by another version of omgoptim")
            signature = Signature.from_json(record.pop("signature"))
            check = record.pop("macs_check")
            lineage = tuple(record.pop("lineage"))
            macs_check = MacsCheck.model_validate(check) if check else None
            manifest = Manifest(signature=signature, lineage=lineage, macs_check=macs_check, **record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{folder} is no artifact", f"{MANIFEST} cannot be read: {error}") from error
        if manifest.runtime not in ENGINES or manifest.precision not in TOLERANCE:
            raise ArtifactError(
                f"artifact {folder} is damaged or of another version of omgoptim",
                f"{MANIFEST} names runtime '{manifest.runtime}' and precision '{manifest.precision}'",
            )
        return manifest

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that its engine opens: not the manifest, the check and what lies beside."""
        return sum(self.files[name]["bytes"] for name in self.size_files)

    @property
    def size_files(self) -> list[str]:
        """Names of the files that `size_bytes` counts."""
        return [name for name, entry in self.files.items() if not entry.get("beside")]


def save_program(folder: Path, program: Path, manifest: Manifest, check: Check) -> None:
    """Save an ONNX file (and its external data, if it has any) as an artifact."""
    with _whole(folder) as partial:
        _copy_program(program, partial, PROGRAM)
        _finish(partial, manifest, check)


def _copy_program(program: Path, partial: Path, name: str = "") -> None:
    """Copy a program, and the files that an ONNX file's weights are in."""
    shutil.copy2(program, partial / (name or program.name))
    for location in external_data(program) if program.suffix == ".onnx" else ():
        (partial / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(program.parent / location, partial / location)


def save_module(
    folder: Path,
    module: nn.Module,
    recipe: Recipe,
    manifest: Manifest,
    check: Check,
    programs: Sequence[Path] = (),
) -> None:
    """Save a module, already in the manifest's precision, as its recipe and weights.

    Args:
        programs: the same model as `model.onnx` or `model.pt2`, put beside it; the ONNX file is what a manifest with
            the runtime of a program opens.
    """
    from omgoptim.runtimes.torch_precision import state_of

    with _whole(folder) as partial:
        if recipe.kind == "pt2":
            shutil.copy2(recipe.spec, partial / PROGRAM2)
        for program in programs:
            _copy_program(program, partial)
        tensors, aliases = {}, {}
        by_storage: dict[tuple[Any, ...], str] = {}
        for name, tensor in state_of(module).items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if tensor.numel() and place in by_storage:  # tied weights are stored once
                aliases[name] = by_storage[place]
            else:
                by_storage[place] = name
                tensors[name] = tensor.detach().cpu().contiguous().clone()
        shapes: dict[str, list[int]] = {}
        saved = 0
        if recipe.kind != "pt2" or manifest.precision != "float32":
            shapes, saved = _save_weights(partial / WEIGHTS, tensors, may_pack=manifest.precision in PACKABLE)
        built = {"recipe": recipe.to_json(), "aliases": aliases, "packed": shapes}
        (partial / RECIPE).write_text(json.dumps(built, indent=1))
        _finish(partial, manifest, check, saved)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded sha256.

    Raises:
        ArtifactError: a file is missing or was changed.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"artifact {folder} lacks {name}", "the manifest lists it", "run the compression again")
        if _sha256(path) != entry["sha256"]:
            raise ArtifactError(
                f"artifact {folder} is damaged",
                f"{name} is not the file that was saved (its sha256 differs)",
                "run the compression again, or restore the file",
            )


def open_session(folder: Path, threads: int, device: str | None = None) -> tuple[Manifest, Session]:
    """Open an artifact in its engine. The files are verified first."""
    manifest = Manifest.read(folder)
    verify_files(folder, manifest)
    engine = engine_named(manifest.runtime)
    place = device or manifest.device
    reason = engine.missing(place)
    if reason:
        raise ArtifactError(f"artifact {folder} needs {manifest.runtime}", reason)
    settings = Settings(threads=threads, device=place, precision=manifest.precision)
    target = folder / PROGRAM if engine.runs == "program" else load_module(folder, manifest).to(place)
    try:
        return manifest, engine.open(target, manifest.signature, settings)
    except OmgoptimError:
        raise
    except Exception as error:  # engines raise kinds of their own without a common base
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{manifest.runtime} cannot open artifact {folder}", said) from error


def read_recipe(folder: Path) -> Recipe:
    """How to build the module of a module artifact."""
    from omgoptim.models.source import Recipe

    recipe = Recipe.from_json(json.loads((folder / RECIPE).read_text())["recipe"])
    return replace(recipe, spec=str(folder / PROGRAM2)) if recipe.kind == "pt2" else recipe


def load_module(folder: Path, manifest: Manifest) -> nn.Module:
    """Build the module of a module artifact and load its weights."""
    from safetensors.torch import load_file

    from omgoptim.models.source import build
    from omgoptim.models.sparse import unpack
    from omgoptim.runtimes.torch_precision import convert, load_state

    recipe = read_recipe(folder)
    module = convert(build(recipe), manifest.precision)
    if (folder / WEIGHTS).is_file():
        built = json.loads((folder / RECIPE).read_text())
        aliases = built["aliases"]
        state = unpack(load_file(folder / WEIGHTS), built.get("packed", {}))
        try:
            load_state(module, state | {name: state[kept] for name, kept in aliases.items()})
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(
                f"the weights of artifact {folder} do not fit the module that {recipe.spec} builds now",
                str(error),
                "the model's code changed since the run: restore it, or run again",
            ) from error
    return module


def load_line(folder: Path, manifest: Manifest) -> str:
    """Python that opens the artifact."""
    lines = [f"import omgoptim; model = omgoptim.open_artifact({str(folder)!r})"]
    if manifest.runtime == "onnxruntime":
        lines.append(f"# without omgoptim: onnxruntime.InferenceSession({str(folder / PROGRAM)!r})")
    elif manifest.runtime == "openvino":
        lines.append(f"# without omgoptim: openvino.Core().compile_model({str(folder / PROGRAM)!r}, 'CPU')")
    return "\n".join(lines)


def copy_artifact(folder: Path, target: Path) -> None:
    """Copy an artifact to where the user wants it; whole or not at all."""
    with _whole(target) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A partial folder beside `folder` that becomes it at the end, or disappears."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _save_weights(path: Path, tensors: dict[str, Tensor], *, may_pack: bool) -> tuple[dict[str, list[int]], int]:
    """Save weights, packed where that is worth it: the shapes of the packed ones, and the bytes it saved."""
    from safetensors.torch import save_file

    from omgoptim.models.sparse import dense_bytes, pack

    stored, shapes = pack(tensors) if may_pack else (tensors, {})
    if dense_bytes(stored) > (1 - WORTH_PACKING) * dense_bytes(tensors):
        shapes = {}
    save_file(tensors, path)
    if not shapes:
        return {}, 0
    dense = path.stat().st_size  # of a real file: the header counts too
    save_file(stored, path)
    return shapes, dense - path.stat().st_size


def _finish(partial: Path, manifest: Manifest, check: Check, saved: int = 0) -> None:
    """Write the check and the manifest; `saved` bytes were saved by packing."""
    names = [path.relative_to(partial).as_posix() for path in sorted(partial.rglob("*")) if path.is_file()]
    beside = _beside(names, manifest)
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
        | ({"beside": True} if name in beside else {})
        for name in names
        if name not in (MANIFEST, CHECK)
    }
    write_check(partial, check)
    whole = replace(manifest, files=files)
    dense = whole.size_bytes + saved if saved and WEIGHTS not in beside else None
    (partial / MANIFEST).write_text(json.dumps(replace(whole, dense_size_bytes=dense).to_json(), indent=1))


def _beside(names: Sequence[str], manifest: Manifest) -> set[str]:
    """The files that the manifest's engine does not open: the programs of a module, or the module of a program."""
    module = {RECIPE, WEIGHTS} & set(names)
    if engine_named(manifest.runtime).runs == "program":
        return module | ({PROGRAM2} & set(names))
    if WEIGHTS not in names:
        return set(names) - {RECIPE, PROGRAM2}
    return set(names) - module - ({PROGRAM2} if manifest.precision != "float32" else set())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
