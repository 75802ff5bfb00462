"""Finished artifacts in Python: open one, or select another finalist of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from omgoptim.jobs.folder import find_run, project_of, runs_root
from omgoptim.jobs.pick import pick as pick_from
from omgoptim.jobs.project import find_project
from omgoptim.models.artifact import code_project
from omgoptim.models.opened_model import OpenedModel
from omgoptim.models.opened_model import open_artifact as open_folder
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.reports import EfficiencyReport


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
    folder = Path(path)
    if not folder.is_dir() and len(folder.parts) == 1:
        folder = runs_root(find_project(None)) / folder / "artifact"
    folders = [str(each) for each in allow_path]
    project = project_of(folder)
    if project is None:
        project = Path.cwd()
        folders += filter(None, [code_project(folder)])
    return open_folder(folder, PathPolicy.of(project, folders, list(allow_module), trust_artifact=trust), threads)
