"""An artifact: one folder that holds everything needed to run a model, and that proves itself when it is opened.

`manifest.json` says which engine runs it, how it is called, and the sha256 of every file. `check.npz` holds a small
random batch and what the model gave for it before it was saved. A program (`model.onnx`) stands alone; a module is its
`recipe.json` (how the user's code builds it) and `weights.safetensors`, or a `.pt2` file. Never a pickle.

This module imports no torch: an ONNX artifact opens without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import ArtifactError
from omgoptim.reports import MacsCheck
from omgoptim.runtimes import Session, Settings, engine_named
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from omgoptim.models.source import Recipe

FORMAT = 1
MANIFEST, CHECK, PROGRAM, PROGRAM2, WEIGHTS, RECIPE = (
    "manifest.json",
    "check.npz",
    "model.onnx",
    "model.pt2",
    "weights.safetensors",
    "recipe.json",
)

TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-2, "int8": 1e-2, "int8_dynamic": 1e-2}
"""How far, of the outputs' own scale, a reopened artifact may be from what was saved, by precision."""


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
            return Manifest(signature=signature, lineage=lineage, macs_check=macs_check, **record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder} is no artifact", f"{MANIFEST} cannot be read: {error}") from error

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that a deployment needs: all but the manifest and the check."""
        return sum(entry["bytes"] for entry in self.files.values())


@dataclass(frozen=True, slots=True)
class Check:
    """A small batch, and what the model gave for it in the memory of the process that saves it."""

    batch: Mapping[str, NDArray[Any]]
    outputs: list[NDArray[Any]]


def save_program(folder: Path, program: Path, manifest: Manifest, check: Check) -> None:
    """Save an ONNX file (and its external data, if it has any) as an artifact."""
    with _whole(folder) as partial:
        shutil.copy2(program, partial / PROGRAM)
        for data in program.parent.glob(f"{program.name}*"):
            if data != program:  # external data is named after the program, and referred to by that name
                shutil.copy2(data, partial / data.name)
        _finish(partial, manifest, check)


def save_module(folder: Path, module: nn.Module, recipe: Recipe, manifest: Manifest, check: Check) -> None:
    """Save a module, already in the manifest's precision, as its recipe and weights."""
    from safetensors.torch import save_file

    from omgoptim.runtimes.torch_precision import state_of

    with _whole(folder) as partial:
        if recipe.kind == "pt2":
            shutil.copy2(recipe.spec, partial / PROGRAM2)
        tensors, aliases = {}, {}
        by_storage: dict[tuple[Any, ...], str] = {}
        for name, tensor in state_of(module).items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if tensor.numel() and place in by_storage:  # tied weights are stored once
                aliases[name] = by_storage[place]
            else:
                by_storage[place] = name
                tensors[name] = tensor.detach().cpu().contiguous().clone()
        if recipe.kind != "pt2" or manifest.precision != "float32":
            save_file(tensors, partial / WEIGHTS)
        (partial / RECIPE).write_text(json.dumps({"recipe": recipe.to_json(), "aliases": aliases}, indent=1))
        _finish(partial, manifest, check)


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


def verify_outputs(folder: Path, manifest: Manifest, session: Session) -> float:
    """Run the recorded batch and compare with the recorded outputs.

    Returns:
        The largest difference, relative to the outputs' own scale.

    Raises:
        ArtifactError: NaN, or a difference above `TOLERANCE`.
    """
    with np.load(folder / CHECK, allow_pickle=False) as file:
        batch = {name[3:]: file[name] for name in file.files if name.startswith("in:")}
        recorded = [file[f"out:{index}"] for index in range(sum(name.startswith("out:") for name in file.files))]
    worst = max_difference(recorded, session.run(batch))
    if not worst <= TOLERANCE[manifest.precision]:
        raise ArtifactError(
            f"artifact {folder} does not give what it gave when it was saved",
            f"its outputs differ by {worst:.3g} of their scale; at most {TOLERANCE[manifest.precision]:g} was expected",
            "the engine or its version changes the result: run the compression again with this Python",
        )
    return worst


def max_difference(expected: list[NDArray[Any]], actual: list[NDArray[Any]]) -> float:
    """Largest absolute difference over all outputs, relative to the expected outputs' largest value; NaN if any is."""
    if len(expected) != len(actual) or any(a.shape != b.shape for a, b in zip(expected, actual, strict=True)):
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, actual, strict=True):
        if one.size:
            a, b = one.astype(np.float64), other.astype(np.float64)
            both_inf = np.isinf(a) & (a == b)
            difference = float(np.where(both_inf, 0.0, np.abs(a - np.where(both_inf, a, b))).max())
            finite = np.abs(a[np.isfinite(a)])
            worst = max(worst, difference / max(float(finite.max(initial=0.0)), 1e-6))
            if np.isnan(difference):
                return float("nan")
    return worst


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
    return manifest, engine.open(target, manifest.signature, settings)


def read_recipe(folder: Path) -> Recipe:
    """How to build the module of a module artifact."""
    from omgoptim.models.source import Recipe

    recipe = Recipe.from_json(json.loads((folder / RECIPE).read_text())["recipe"])
    return replace(recipe, spec=str(folder / PROGRAM2)) if recipe.kind == "pt2" else recipe


def load_module(folder: Path, manifest: Manifest) -> nn.Module:
    """Build the module of a module artifact and load its weights."""
    from safetensors.torch import load_file

    from omgoptim.models.source import build
    from omgoptim.runtimes.torch_precision import convert, load_state

    recipe = read_recipe(folder)
    module = convert(build(recipe), manifest.precision)
    if (folder / WEIGHTS).is_file():
        state = load_file(folder / WEIGHTS)
        aliases = json.loads((folder / RECIPE).read_text())["aliases"]
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


def _finish(partial: Path, manifest: Manifest, check: Check) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(partial.iterdir())
        if path.name not in (MANIFEST, CHECK)
    }
    arrays = {f"in:{name}": array for name, array in check.batch.items()}
    arrays |= {f"out:{index}": array for index, array in enumerate(check.outputs)}
    np.savez(partial / CHECK, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for options
    (partial / MANIFEST).write_text(json.dumps(replace(manifest, files=files).to_json(), indent=1))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
