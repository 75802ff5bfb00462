"""A run's folder: the only truth about a run. There is no other database.

    .omgoptim/runs/<id>/
        request.json  state.json  worker.json  worker.lock  events.jsonl  log.txt
        work/         scratch, gone when the run has ended
        checkpoints/  what a run that was cut off can be resumed from, gone when the run is done
        alternatives/ other finalists of a quantize run, each NAME/ with its report NAME.json
        artifact/     report.json  report.html      only of a run that ended well

A file appears whole or not at all. `report.json` is written last: a run that has one is done.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omgoptim.errors import RunError, did_you_mean
from omgoptim.models.origin import is_sealed, sealed
from omgoptim.reports import RunState

ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


@dataclass(frozen=True, slots=True)
class Submission:
    """What `request.json` holds: what was asked, for which project, and which Python does it."""

    verb: str
    request: dict[str, Any]
    project: Path
    python: str
    found_by: str
    version: str

    def to_json(self) -> dict[str, Any]:
        python = {"path": self.python, "found_by": self.found_by, "version": self.version}
        return {"verb": self.verb, "request": self.request, "project": str(self.project), "python": python}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Submission:
        python = record["python"]
        return Submission(
            record["verb"],
            record["request"],
            Path(record["project"]),
            python["path"],
            python["found_by"],
            python["version"],
        )


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A process, told apart from a later one that got the same number: see `processes.birth`."""

    pid: int
    born: float


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run, and how its files are read and written."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def request_file(self) -> Path:
        return self.path / "request.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def worker_file(self) -> Path:
        return self.path / "worker.json"

    @property
    def worker_lock(self) -> Path:
        """Held by the worker for its whole life. Who holds it may write the state."""
        return self.path / "worker.lock"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log_file(self) -> Path:
        return self.path / "log.txt"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def checkpoints(self) -> Path:
        """What a run that was cut off goes on from."""
        return self.path / "checkpoints"

    @property
    def artifact(self) -> Path:
        return self.path / "artifact"

    @property
    def alternatives(self) -> Path:
        """Finalists that were not delivered: see `pick.py`."""
        return self.path / "alternatives"

    @property
    def report_file(self) -> Path:
        return self.path / "report.json"

    @property
    def html_file(self) -> Path:
        return self.path / "report.html"

    def read_request(self) -> Submission:
        """What was asked.

        Raises:
            RunError: request.json is missing or damaged.
        """
        try:
            return Submission.from_json(json.loads(self.request_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"run {self.id} has no readable request.json", str(error), "start the run again") from None

    def write_request(self, submission: Submission) -> None:
        """Write what is asked, sealed as this user's."""
        write_whole(self.request_file, json.dumps(sealed("request", submission.to_json()), indent=2))

    def is_own_request(self) -> bool:
        """Whether this user asked for it, and in these words."""
        try:
            return is_sealed("request", json.loads(self.request_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, RecursionError):
            return False

    def stored_state(self) -> RunState:
        """The state as it was last written, true or not: `states.read_state` makes it true."""
        try:
            state = RunState.model_validate_json(self.state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the submitting process died before it wrote one
            born = datetime.fromtimestamp(self.path.stat().st_mtime, timezone.utc).isoformat(timespec="milliseconds")
            verb = self.id.split("-")[0]
            state = RunState(
                run_id=self.id, verb=verb, status="starting", started=born, updated=born, folder=str(self.path)
            )
        process = self.read_worker()
        truth: dict[str, Any] = {"run_id": self.id, "folder": str(self.path)}  # a project may have been moved
        truth |= {} if state.pid or process is None else {"pid": process.pid}
        return state.model_copy(update=truth)

    def write_state(self, state: RunState) -> None:
        write_whole(self.state_file, state.model_dump_json(indent=2))

    def read_worker(self) -> WorkerProcess | None:
        """The worker's process, or None if none was started yet."""
        try:
            record = json.loads(self.worker_file.read_text(encoding="utf-8"))
            return WorkerProcess(record["pid"], record["born"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_worker(self, process: WorkerProcess) -> None:
        write_whole(self.worker_file, json.dumps({"pid": process.pid, "born": process.born}))

    def discard_scratch(self) -> None:
        """Remove what only a running worker has a use for: scratch, half-written artifacts and half-written files."""
        for leftover in (self.work, *self.path.glob("artifact.partial*")):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def discard_checkpoints(self) -> None:
        """After a run that ended well."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def discard_unproved(self) -> None:
        """After a run that did not end well: no scratch, and nothing that looks like a result.

        An artifact that was complete but not yet proved is kept under a name that nothing opens.
        """
        self.discard_scratch()
        self.html_file.unlink(missing_ok=True)
        shutil.rmtree(self.alternatives, ignore_errors=True)
        if self.artifact.exists():
            os.replace(self.artifact, self.path / f"artifact.unproved-{secrets.token_hex(2)}")


def runs_root(project: Path) -> Path:
    """The folder of a project's runs; it need not exist."""
    return project / ".omgoptim" / "runs"


def project_of(folder: Path) -> Path | None:
    """The project whose run an artifact folder belongs to, by where it lies; None where it lies elsewhere."""
    run = Path(os.path.abspath(folder)).parent  # not resolved: .omgoptim may be a link to a larger disk
    return run.parents[2] if len(run.parents) > 2 and runs_root(run.parents[2]) == run.parent else None


def new_run(project: Path, verb: str) -> RunFolder:
    """A new, empty run folder, named `verb-date-time-xxxx` in UTC."""
    root = runs_root(project)
    root.mkdir(parents=True, exist_ok=True)
    ignore = root.parent / ".gitignore"
    if not ignore.exists():
        write_whole(ignore, "*\n")
    while True:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M")
        path = root / f"{verb}-{stamp}-{''.join(secrets.choice(ALPHABET) for _ in range(4))}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return RunFolder(path)


def run_folders(project: Path) -> list[RunFolder]:
    """Every run of a project, by name. A link is none: it may lead out of the project."""
    root = runs_root(project)
    if not root.is_dir():
        return []
    return [RunFolder(path) for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink()]


def find_run(project: Path, run_id: str) -> RunFolder:
    """The run of that id; the start or the end of an id will do if only one run has it.

    Raises:
        RunError: there is none, or there are several.
    """
    folders = run_folders(project)
    exact = [folder for folder in folders if folder.id == run_id]
    near = [folder for folder in folders if folder.id.startswith(run_id) or folder.id.endswith(run_id)]
    found = exact or (near if run_id else [])
    if len(found) == 1:
        return found[0]
    how = "`omgoptim runs list` (tool: runs, action list) shows the ids"
    if found:
        newest = ", ".join(folder.id for folder in found[-5:])
        raise RunError(f"'{run_id}' means {len(found)} runs", f"for instance {newest}", how)
    recent = [folder.id for folder in folders[-10:]]
    raise RunError(f"there is no run '{run_id}'", did_you_mean(run_id, recent) or f"{project} has no runs yet", how)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, and replaces what was there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    partial.write_text(text, encoding="utf-8")
    for _ in range(20 if sys.platform == "win32" else 0):  # Windows refuses while a reader has the file open
        try:
            os.replace(partial, path)
        except PermissionError:
            time.sleep(0.02)
        else:
            return
    os.replace(partial, path)


def now() -> str:
    """The time as every file of a run writes it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
