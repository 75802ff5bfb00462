"""Finished artifacts in Python: open one, or select another finalist of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from omgoptim.errors import ArtifactError, SetupError, TechniqueError
from omgoptim.jobs.actions import pick as pick_from
from omgoptim.jobs.folder import find_run, project_of, runs_root
from omgoptim.jobs.project import find_project
from omgoptim.models.opened_model import OpenedModel
from omgoptim.models.opened_model import open_artifact as open_folder
from omgoptim.models.recipe import code_project
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.reports import EfficiencyReport

if TYPE_CHECKING:
    from torch import nn

    from omgoptim.models.manifest import Manifest
    from omgoptim.models.output_check import OutputCheck


def pick(run_id: str, name: str, *, project: str | None = None) -> EfficiencyReport:
    """Select another finalist of a quantize run: its artifact and report replace the run's.

    Nothing is computed again. The previous artifact stays among the alternatives.

    Args:
        run_id: of the quantize run.
        name: of an entry of the report's `alternatives`.
        project: folder whose runs are searched; default: the current project.

    Example:
        >>> import omgoptim
        >>> report = omgoptim.quantize("net.py:build", data="net.py:load")  # doctest: +SKIP
        >>> omgoptim.pick(report.run_id, report.alternatives[0].name).artifact.path  # doctest: +SKIP

    Raises:
        RunError: there is no such run, or it keeps nothing of that name.
    """
    return pick_from(find_run(find_project(project), run_id), name)


def open_artifact(
    path: str | Path,
    *,
    trust: bool = False,
    allow_path: Iterable[str | Path] = (),
    allow_module: Iterable[str] = (),
    threads: int | None = None,
) -> OpenedModel:
    """Open an artifact folder, or a run id of this project, as a callable with the original's forward signature.

    Tensors in give tensors out, arrays in give arrays out. Every file is checked against its recorded sha256. A recipe
    runs only if you made the artifact, or with `trust`; and then it runs only code of the project (the one that the
    run's folder lies in; else the one that you made it in, or the working directory) and of what is allowed here.

    Args:
        path: the artifact folder, or a run id.
        trust: open an artifact that you did not make though its recipe runs code.
        allow_path: further folders whose code the recipe may name.
        allow_module: installed modules whose functions and classes it may name, such as `timm.models`.
        threads: CPU threads; default: the cores this process may use.

    Example:
        >>> import omgoptim, torch
        >>> model = omgoptim.open_artifact(".omgoptim/runs/ID/artifact")  # doctest: +SKIP
        >>> model(torch.randn(1, 3, 224, 224)).shape  # doctest: +SKIP

    Raises:
        ArtifactError: it is not an artifact, is damaged, its engine is not installed, or its recipe runs code without
            permission.
    """
    folder, policy = _located(path, trust, allow_path, allow_module)
    return open_folder(folder, policy, threads)


def export_coreml(
    path: str | Path,
    target: str | Path,
    *,
    trust: bool = False,
    allow_path: Iterable[str | Path] = (),
    allow_module: Iterable[str] = (),
) -> Path:
    """Export a module artifact as a Core ML package at batch 1, for iOS 17 and macOS 14 or later.

    An export only: Core ML runs on Apple's devices, so neither time nor quality of the package is measured here. Check
    its outputs on the device against `check.npz` of the artifact. Needs coremltools.

    Args:
        path: the folder of an artifact that holds a module (profile, prune, factorize, distill), or a run id.
        target: the `.mlpackage` to write; must not exist yet.
        trust: open an artifact that you did not make though its recipe runs code.
        allow_path: further folders whose code the recipe may name.
        allow_module: installed modules whose functions and classes it may name.

    Example:
        >>> import omgoptim
        >>> omgoptim.export_coreml(".omgoptim/runs/ID/artifact", "net.mlpackage")  # doctest: +SKIP

    Raises:
        SetupError: coremltools is not installed.
        ArtifactError: the artifact holds no module, or `target` exists.
        TechniqueError: torch or coremltools cannot convert the model.
    """
    import importlib.util

    from omgoptim.models.artifact import check_artifact, has_module, load_module
    from omgoptim.models.manifest import Manifest
    from omgoptim.models.output_check import read_check

    if importlib.util.find_spec("coremltools") is None:
        raise SetupError("Core ML export needs coremltools", "it is not installed", "pip install coremltools")
    folder, policy = _located(path, trust, allow_path, allow_module)
    manifest = check_artifact(folder, policy)
    place = Path(target)
    if not has_module(manifest, policy) or manifest.precision != "float32":
        raise ArtifactError(
            f"artifact {folder} has no float32 module to convert",
            f"it runs on {manifest.runtime} in {manifest.precision}",
            "export the artifact that it was made from",
        )
    if place.exists() or place.suffix != ".mlpackage":
        raise ArtifactError(f"'{place}' is not written", "it exists, or does not end in .mlpackage", "name a new file")
    _write_coreml(load_module(folder, manifest, policy).cpu().eval(), Manifest.read(folder), read_check(folder), place)
    return place


def _write_coreml(module: nn.Module, manifest: Manifest, check: OutputCheck, place: Path) -> None:
    import coremltools

    from omgoptim.models.samples import as_tensors
    from omgoptim.runtimes.export import exported_program, first_sample
    from omgoptim.runtimes.export_patches import quiet_export

    signature = manifest.signature.at_batch(1)
    program = exported_program(module, as_tensors(first_sample(check.batch), signature.dtypes), signature)
    partial = place.with_name(f".{place.name}.partial.mlpackage")
    try:
        with quiet_export():
            package = coremltools.convert(
                program.run_decompositions({}), minimum_deployment_target=coremltools.target.iOS17
            )
            package.save(str(partial))
        partial.rename(place)
    except Exception as error:  # coremltools raises kinds of its own without a common base
        shutil.rmtree(partial, ignore_errors=True)
        message = next((line for line in str(error).splitlines() if line.strip()), "")
        raise TechniqueError(
            "coremltools cannot convert the model", f"{type(error).__name__}: {message[:300]}"
        ) from error


def _located(
    path: str | Path, trust: bool, allow_path: Iterable[str | Path], allow_module: Iterable[str]
) -> tuple[Path, PathPolicy]:
    """Return the folder of an artifact, and what its recipe may name."""
    folder = Path(path)
    if not folder.is_dir() and len(folder.parts) == 1:
        folder = runs_root(find_project(None)) / folder / "artifact"
    folders = [str(each) for each in allow_path]
    project = project_of(folder)
    if project is None:
        project = Path.cwd()
        folders += filter(None, [code_project(folder)])
    return folder, PathPolicy.of(project, folders, list(allow_module), trust_artifact=trust)
