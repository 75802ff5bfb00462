"""Artifacts: one folder that holds everything needed to run a model and to check it when it is opened.

- `manifest.json`: engine, signature and the sha256 of every file, signed (HMAC) with a key of the user who saved it.
- `check.npz`: a small random batch and the model's outputs for it before it was saved.
- A program is `model.onnx`, or `model.pte` for ExecuTorch. A module is `recipe.json` (how the user's code builds it)
  and `weights.safetensors`, with sparse weights packed (`weights_file.py`), or a `.pt2` file. There are no pickles.
- A reshaped module is also saved as ONNX and .pt2; an artifact's size is that of the files that its engine opens.

This module imports no torch: an ONNX artifact opens without it.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import ArtifactError, ModelError, OmgoptimError, RequestError
from omgoptim.models.manifest import (
    LOWERED,
    MANIFEST,
    PROGRAM,
    PROGRAM2,
    RECIPE,
    WEIGHTS,
    Manifest,
    listed_file,
    verify_files,
)
from omgoptim.models.output_check import CHECK, OutputCheck, write_check
from omgoptim.models.pte_file import LAYERS
from omgoptim.models.recipe import read_record, refuse_foreign_recipe
from omgoptim.models.security.file_integrity import sha256, sign_record
from omgoptim.runtimes import Session, SessionSettings, engine_named
from omgoptim.runtimes.engine import engine_message
from omgoptim.runtimes.external_data import MalformedProtobuf, external_data
from omgoptim.runtimes.onnxruntime import KEEP_FLOAT_LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from omgoptim.models.recipe import Recipe
    from omgoptim.models.security.path_policy import PathPolicy

ON_DEVICE = (
    "// Android, Kotlin, org.pytorch:executorch-android: "
    'Module.load("model.pte").forward(EValue.from(Tensor.fromBlob(input, shape)))',
    "// iOS, Swift, package executorch with backend_xnnpack: "
    "let module = Module(filePath: path); let output = try module.forward(Tensor(input, shape: shape))",
)
"""Lines that load an ExecuTorch program in an app."""

PACKABLE = ("float32", "float16", "bfloat16")
"""Precisions whose weights may be packed; int8 layers have a form of their own."""


def save_program(folder: Path, program: Path, manifest: Manifest, check: OutputCheck) -> None:
    """Save a program as an artifact: an ONNX file with its external data, or a lowered one with its layers."""
    with _atomic_folder(folder) as partial:
        _copy_program(program, partial, program_file(manifest.runtime))
        if engine_named(manifest.runtime).runs == "lowered":
            shutil.copy2(program.with_name(LAYERS), partial / LAYERS)
        _finish(partial, manifest, check)


def _copy_program(program: Path, partial: Path, name: str = "") -> None:
    """Copy a program and the external data files of an ONNX file."""
    shutil.copy2(program, partial / (name or program.name))
    for location in external_data(program) if program.suffix == ".onnx" else ():
        (partial / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(program.parent / location, partial / location)


def program_file(runtime: str) -> str:
    """Return the name of the file that an engine of programs opens."""
    return LOWERED if engine_named(runtime).runs == "lowered" else PROGRAM


def save_module(
    folder: Path,
    module: nn.Module,
    recipe: Recipe,
    manifest: Manifest,
    check: OutputCheck,
    programs: Sequence[Path] = (),
) -> None:
    """Save a module, already in the manifest's precision, as its recipe and weights.

    Args:
        folder: where the artifact appears, whole or not at all.
        module: not changed.
        recipe: how a fresh process builds the module.
        manifest: engine, precision and signature, as they are to be recorded.
        check: example inputs and the outputs that an opened artifact must repeat.
        programs: the same model as `model.onnx` or `model.pt2`, put beside it; the ONNX file is what a manifest with
            the runtime of a program opens.
    """
    from omgoptim.models.weights_file import distinct_tensors, save_weights

    with _atomic_folder(folder) as partial:
        if recipe.kind == "pt2":
            shutil.copy2(recipe.spec, partial / PROGRAM2)
        for program in programs:
            _copy_program(program, partial)
        tensors, aliases = distinct_tensors(module)
        shapes: dict[str, list[int]] = {}
        saved = 0
        if recipe.kind != "pt2" or manifest.precision != "float32":
            shapes, saved = save_weights(partial / WEIGHTS, tensors, may_pack=manifest.precision in PACKABLE)
        built = {"recipe": recipe.to_json(), "aliases": aliases, "packed": shapes}
        (partial / RECIPE).write_text(json.dumps(built, indent=1))
        _finish(partial, manifest, check, saved)


def check_artifact(folder: Path, policy: PathPolicy) -> Manifest:
    """Check everything about an artifact that can be checked before its engine opens it.

    Raises:
        ArtifactError: not an artifact, a file was changed or lies outside the folder, or its engine runs code of a
            recipe that this user did not make and does not trust.
    """
    manifest = Manifest.read(folder)
    verify_files(folder, manifest)
    if engine_named(manifest.runtime).runs == "module":
        refuse_foreign_recipe(folder, manifest, policy)
    elif not manifest.made_here and engine_named(manifest.runtime).runs == "program":
        try:
            locations = external_data(listed_file(folder, manifest, PROGRAM))
        except (ModelError, MalformedProtobuf) as error:
            raise ArtifactError(f"artifact {folder} is damaged", str(error)) from error
        for location in locations:
            listed_file(folder, manifest, location)
    return manifest


def open_session(folder: Path, threads: int, policy: PathPolicy, device: str | None = None) -> tuple[Manifest, Session]:
    """Verify the files of an artifact and open it in its engine.

    Args:
        folder: the artifact.
        threads: of the engine.
        policy: the files and modules whose code its recipe may name.
        device: default: the manifest's.
    """
    manifest = Manifest.read(folder)
    verify_files(folder, manifest)
    engine = engine_named(manifest.runtime)
    place = device or manifest.device
    reason = engine.missing(place)
    if reason:
        raise ArtifactError(f"artifact {folder} needs {manifest.runtime}", reason)
    settings = SessionSettings(threads, place, manifest.precision, manifest.mixed_precision)
    target: Any
    if engine.runs == "module":
        target = load_module(folder, manifest, policy).to(place)
    else:
        target = listed_file(folder, manifest, program_file(manifest.runtime))
    try:
        return manifest, engine.open(target, manifest.signature, settings)
    except OmgoptimError:
        raise
    except Exception as error:  # engines raise kinds of their own without a common base
        raise ArtifactError(f"{manifest.runtime} cannot open artifact {folder}", engine_message(error)) from error


def has_module(manifest: Manifest, policy: PathPolicy) -> bool:
    """Return whether the artifact's module can be built; not for a program of another user."""
    if RECIPE not in manifest.files:
        return False
    return engine_named(manifest.runtime).runs == "module" or manifest.made_here or policy.trusted


def load_module(folder: Path, manifest: Manifest, policy: PathPolicy) -> nn.Module:
    """Build the module of a module artifact and load its weights.

    Args:
        folder: the artifact.
        manifest: of this artifact, already read.
        policy: the files and modules whose code the recipe may name.

    Raises:
        ArtifactError: its recipe runs code and is not trusted, names code that the request does not grant, or the
            weights do not fit.
    """
    from omgoptim.models.source import build
    from omgoptim.runtimes.torch_precision import convert

    refuse_foreign_recipe(folder, manifest, policy)
    built = read_record(folder, manifest)
    try:
        module = build(built.recipe, policy)
    except RequestError as error:
        raise ArtifactError(f"artifact {folder} cannot run its code: {error.what}", error.why, error.fix) from error
    module = convert(module, manifest.precision)
    if WEIGHTS in manifest.files:
        from omgoptim.models.weights_file import load_weights

        load_weights(folder, manifest, module, built)
    return module


def loading_snippet(folder: Path, manifest: Manifest) -> str:
    """Return Python code that opens the artifact."""
    lines = [f"import omgoptim; model = omgoptim.open_artifact({str(folder)!r})"]
    if manifest.runtime == "onnxruntime":
        options = ", options" if manifest.mixed_precision else ""
        lines.append(f"# without omgoptim: onnxruntime.InferenceSession({str(folder / PROGRAM)!r}{options})")
        if options:  # else layers in float would be computed in int8
            lines.append("# with options = onnxruntime.SessionOptions()")
            lines.append(f"# and options.add_session_config_entry{KEEP_FLOAT_LAYERS}")
    elif manifest.runtime == "openvino":
        lines.append(f"# without omgoptim: openvino.Core().compile_model({str(folder / PROGRAM)!r}, 'CPU')")
    elif manifest.runtime == "executorch":
        file = str(folder / LOWERED)
        lines.append(
            f"# without omgoptim: executorch.runtime.Runtime.get().load_program({file!r}).load_method('forward')"
        )
        lines += ON_DEVICE
    return "\n".join(lines)


def copy_artifact(folder: Path, target: Path) -> None:
    """Copy an artifact to a folder of the user's choice, atomically."""
    with _atomic_folder(target) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` on success and deleted on failure."""
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _finish(partial: Path, manifest: Manifest, check: OutputCheck, saved: int = 0) -> None:
    """Write the output check and the signed manifest; `saved` are the bytes saved by packing."""
    write_check(partial, check)
    names = [path.relative_to(partial).as_posix() for path in sorted(partial.rglob("*")) if path.is_file()]
    beside = _unopened_files(names, manifest) | {CHECK}
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)}
        | ({"beside": True} if name in beside else {})
        for name in names
        if name != MANIFEST
    }
    finished = replace(manifest, files=files)
    dense = finished.size_bytes + saved if saved and WEIGHTS not in beside else None
    record = sign_record("artifact", replace(finished, dense_size_bytes=dense).to_json())
    (partial / MANIFEST).write_text(json.dumps(record, indent=1))


def _unopened_files(names: Sequence[str], manifest: Manifest) -> set[str]:
    """Return the files that the manifest's engine does not open: programs of a module, or the module of a program."""
    module = {RECIPE, WEIGHTS} & set(names)
    if engine_named(manifest.runtime).runs == "lowered":
        return set(names) - {LOWERED}
    if engine_named(manifest.runtime).runs == "program":
        return module | ({PROGRAM2} & set(names))
    if WEIGHTS not in names:
        return set(names) - {RECIPE, PROGRAM2}
    return set(names) - module - ({PROGRAM2} if manifest.precision != "float32" else set())
