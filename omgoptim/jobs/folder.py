"""Run folder: all that is stored about a run; there is no other database.

    .omgoptim/runs/<id>/
        request.json  state.json  worker.json  worker.lock  events.jsonl  log.txt
        work/         scratch, gone when the run has ended
        checkpoints/  checkpoints of an interrupted run, removed when the run is done
        alternatives/ other finalists of a quantize run, each NAME/ with its report NAME.json
        artifact/     report.json  report.html  badge.svg      only of a run that ended well

A file appears whole or not at all. `report.json` is written last: a run that has one is done.
Requests, states and `worker.json` are signed with this user's key (HMAC); a report's HMAC lies beside it, as
`.report.json.seal`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omgoptim.errors import RunError, did_you_mean
from omgoptim.jobs.storage import read_record, write_whole
from omgoptim.models.report_file import read_report, sign_report
from omgoptim.models.security.file_integrity import HMAC_FIELD, RecordKind, can_sign, is_signed, sign_record
from omgoptim.reports import EfficiencyReport, RunState

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Pattern of a run folder's name; other folders are ignored."""

ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


@dataclass(frozen=True, slots=True)
class Submission:
    """Content of `request.json`: verb, request, project, and the Python that runs it."""

    verb: str
    request: dict[str, Any]
    project: Path
    python: str
    found_by: str
    version: str

    def to_json(self) -> dict[str, Any]:
        """Return the content of `request.json`."""
        python = {"path": self.python, "found_by": self.found_by, "version": self.version}
        return {"verb": self.verb, "request": self.request, "project": str(self.project), "python": python}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Submission:
        """Return the inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        python, request = record["python"], record["request"]
        texts = [record["verb"], record["project"], *(python[name] for name in ("path", "found_by", "version"))]
        if not isinstance(request, dict) or not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError("its fields are not those of a request")
        verb, project, *found = texts
        return Submission(verb, request, Path(project), *found)


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A process, distinguished from a later one of the same id: see `processes.birth`."""

    pid: int
    born: float


class _Entry:
    """Descriptor of the path of an entry in a run folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunFolder, owner: type[RunFolder]) -> Path:
        return run.path / self._name


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Folder of a run: its paths, and access to its files."""

    path: Path

    request_file = _Entry("request.json")
    """File of the submission."""
    state_file = _Entry("state.json")
    """File of the run's state."""
    worker_file = _Entry("worker.json")
    """File that names the worker process."""
    worker_lock = _Entry("worker.lock")
    """Lock that the worker holds for its whole life. Its holder may write the state."""
    events_file = _Entry("events.jsonl")
    """File of the run's events, one JSON object a line."""
    log_file = _Entry("log.txt")
    """Output of the worker and of the user's code."""
    work = _Entry("work")
    """Scratch folder, removed when the run ends."""
    checkpoints = _Entry("checkpoints")
    """Folder of the checkpoints from which an interrupted run resumes."""
    artifact = _Entry("artifact")
    """Folder of the artifact."""
    alternatives = _Entry("alternatives")
    """Finalists that were not chosen: see `actions.pick`."""
    report_file = _Entry("report.json")
    """File of the report."""
    html_file = _Entry("report.html")
    """File of the report's page."""
    badge_file = _Entry("badge.svg")
    """File of the report's badge."""

    @property
    def id(self) -> str:
        """Id of the run: the name of its folder."""
        return self.path.name

    def read_request(self) -> Submission:
        """Return the submission of the run.

        Raises:
            RunError: request.json is missing or damaged.
        """
        try:
            return Submission.from_json(read_record(self.request_file))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"run {self.id} has no readable request.json", str(error), "start the run again") from None

    def write_request(self, submission: Submission) -> None:
        """Write the request of this run, signed with this user's key."""
        record = sign_record("request", submission.to_json() | {"run": self.id})
        write_whole(self.request_file, json.dumps(record, indent=2))

    def is_own_request(self) -> bool:
        """Return whether this user signed the request, and nothing in it was changed."""
        return self._is_own("request", self.request_file, "run")

    def is_own_state(self) -> bool:
        """Return whether this user signed the state for this run."""
        return self._is_own("state", self.state_file, "run_id")

    def _is_own(self, kind: RecordKind, file: Path, run: str) -> bool:
        try:
            record = read_record(file)
        except (OSError, ValueError):
            return False
        return record.get(run) == self.id and is_signed(kind, record)

    def stored_state(self) -> RunState:
        """Return the state as it was last written; `states.read_state` corrects it."""
        try:
            record = read_record(self.state_file)
            record.pop(HMAC_FIELD, None)
            state = RunState.model_validate(record)
            if datetime.fromisoformat(state.started).tzinfo is None:
                raise ValueError("it has no start time")
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
        """Write the state atomically, signed with this user's key."""
        write_whole(self.state_file, json.dumps(sign_record("state", state.model_dump(mode="json")), indent=2))

    def read_report(self) -> tuple[EfficiencyReport, bool] | None:
        """Return the report, and whether this user's run wrote it; None without a readable report."""
        return read_report(self.report_file, self.id)

    def write_report(self, report: EfficiencyReport) -> None:
        """Write the report, signed with this user's key, as the last file: a run with a report is done."""
        self.write_report_to(self.report_file, report)

    def write_report_to(self, file: Path, report: EfficiencyReport) -> None:
        """Write a further report of this run, such as that of another finalist."""
        text = report.model_dump_json(indent=2)
        sign_report(file, self.id, text)
        write_whole(file, text)

    def read_worker(self) -> WorkerProcess | None:
        """The worker's process, or None if none was started yet, or somebody else named it: it may be any process."""
        try:
            pid, born = (read_record(self.worker_file).get(name) for name in ("pid", "born"))
        except (OSError, ValueError):
            return None
        if not isinstance(pid, int) or isinstance(pid, bool) or pid < 1 or not isinstance(born, float):
            return None
        own = self._is_own("worker", self.worker_file, "run") or not can_sign()
        return WorkerProcess(pid, born) if own else None

    def write_worker(self, process: WorkerProcess) -> None:
        """Write the process that works on the run, atomically and signed with this user's key."""
        record = {"pid": process.pid, "born": float(process.born), "run": self.id}
        write_whole(self.worker_file, json.dumps(sign_record("worker", record)))

    def discard_scratch(self) -> None:
        """Remove the files of a running worker: scratch, and incomplete artifacts and files."""
        for leftover in (self.work, *self.path.glob("artifact.partial*")):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def discard_checkpoints(self) -> None:
        """Remove the checkpoints, after a successful run."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def discard_failed(self) -> None:
        """Remove scratch and partial results, after a run that failed.

        An artifact that was complete but not yet proved is kept under a name that nothing opens.
        """
        self.discard_scratch()
        self.html_file.unlink(missing_ok=True)
        self.badge_file.unlink(missing_ok=True)
        shutil.rmtree(self.alternatives, ignore_errors=True)
        if self.artifact.exists():
            os.replace(self.artifact, self.path / f"artifact.unproved-{secrets.token_hex(2)}")


def runs_root(project: Path) -> Path:
    """Return the folder of a project's runs; it need not exist."""
    return project / ".omgoptim" / "runs"


def project_of(folder: Path) -> Path | None:
    """Return the project whose run an artifact folder belongs to, by its location; None for any other folder."""
    run = Path(os.path.abspath(folder)).parent  # not resolved: .omgoptim may be a link to a larger disk
    return run.parents[2] if len(run.parents) > 2 and runs_root(run.parents[2]) == run.parent else None


def new_run(project: Path, verb: str) -> RunFolder:
    """Return a new, empty run folder, named `verb-date-time-xxxx` in UTC."""
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
    """Return every run of a project, by name.

    Links, and folders that hold a link or a pipe, are left out: what is written to a run stays in the project.
    """
    root = runs_root(project)
    if not root.is_dir():
        return []
    return [RunFolder(path) for path in sorted(root.iterdir()) if is_run(path)]


def is_run(path: Path) -> bool:
    """Return whether a folder can be a run's: a plain name, and only regular files and folders in it."""
    if not NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    try:
        with os.scandir(path) as entries:
            return all(e.is_file(follow_symlinks=False) or e.is_dir(follow_symlinks=False) for e in entries)
    except OSError:
        return False


def find_run(project: Path, run_id: str) -> RunFolder:
    """Return the run with an id, or with a unique beginning or end of one.

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
        raise RunError(f"'{run_id}' matches {len(found)} runs", f"for instance {newest}", how)
    recent = [folder.id for folder in folders[-10:]]
    raise RunError(f"there is no run '{run_id}'", did_you_mean(run_id, recent) or f"{project} has no runs yet", how)
