"""Deliver another finalist of a run: its artifact and its report are there already, and change places."""

from __future__ import annotations

import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from omgoptim.errors import RunError, did_you_mean
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.report_files import write_report_files
from omgoptim.jobs.states import as_done, load_report
from omgoptim.models.report_file import read_report
from omgoptim.reports import EfficiencyReport

LOCK_LIMIT_S = 5.0


def pick(folder: RunFolder, name: str) -> EfficiencyReport:
    """Make a finalist that was kept the artifact of its run; what was the artifact is kept in its place.

    Args:
        folder: of the run.
        name: of an entry of the report's `alternatives`.

    Returns:
        The run's new report: the picked one's own numbers, as they were measured.

    Raises:
        RunError: the run is not done, keeps nothing of that name, or is being changed by another process.
    """
    try:
        with FileLock(folder.worker_lock, timeout=LOCK_LIMIT_S):
            return _pick(folder, name)
    except Timeout:
        raise RunError(
            f"run {folder.id} is being changed by another process", "its lock is held", "try again"
        ) from None


def _pick(folder: RunFolder, name: str) -> EfficiencyReport:
    report = load_report(folder)
    known = [alternative.name for alternative in report.alternatives if _is_plain(alternative.name)]
    if name == report.delivered:
        return report
    if name not in known or report.delivered is None or not _is_plain(report.delivered):
        what = f"run {folder.id} keeps no '{name}'"
        raise RunError(
            what, did_you_mean(name, known) or "it keeps no other finalist", f"omgoptim runs show {folder.id}"
        )
    kept = folder.alternatives
    picked = _report_of(kept / f"{name}.json", folder.id).model_copy(update={"guard": report.guard})
    folder.write_report_to(kept / f"{report.delivered}.json", report)
    _swap(folder.artifact, kept / name, kept / report.delivered)
    folder.write_report(picked)
    folder.write_state(as_done(folder.stored_state(), picked))
    write_report_files(folder, picked)
    return picked


def _is_plain(name: str) -> bool:
    """Return whether a name is a plain entry name that cannot lead out of the run's folder."""
    return re.fullmatch(r"[a-z0-9][a-z0-9-]{0,100}", name) is not None


def _report_of(file: Path, run: str) -> EfficiencyReport:
    found = read_report(file, run)
    if found is None or not found[1]:
        why = "it cannot be read" if found is None else "it was changed since, or somebody else wrote it"
        hint = "run it again: what it keeps is incomplete"
        raise RunError(f"the report of '{file.stem}' is gone or damaged", f"{file}: {why}", hint)
    return found[0]


def _swap(artifact: Path, picked: Path, old: Path) -> None:
    """Put `picked` in the artifact's place and the artifact at `old`: whole folders, or nothing where that fails."""
    if picked.is_symlink() or not picked.is_dir():
        raise RunError(f"the artifact of '{picked.name}' is gone", str(picked), "run it again")
    os.replace(artifact, old)
    try:
        os.replace(picked, artifact)
    except OSError:
        os.replace(old, artifact)
        raise
