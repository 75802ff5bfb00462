"""A run as a Ray job: the project is sent to the head, the run is done there, and its files are fetched back.

The Jobs API returns only the job's log, so report and artifacts are transferred as lines of the log. The job outlives
the process that submitted it: a resumed run finds it by its id; a cancelled run stops it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from omgoptim.errors import OmgoptimError, RunError, SetupError
from omgoptim.executors.connection import probe_head, ray_library, token_mode
from omgoptim.executors.package import pack
from omgoptim.executors.ray import runtime_env
from omgoptim.models.manifest import MANIFEST
from omgoptim.models.report_file import write_signed_report
from omgoptim.models.security.file_integrity import sign_record
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.output_folder import free_output, with_output
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import ModelRequest
from omgoptim.requests.training import ExecutionFields

PROGRESS, RESULT, FAILED = "omgoptim-progress ", "omgoptim-result ", "omgoptim-failed "
"""Prefixes of log lines that are addressed to the submitter."""

REPORT = "report.json"

MOST_BYTES = 200 * 2**20
"""Maximum size of the files that are transferred through the log."""

POLL_S = 1.0
"""Seconds between two queries of a job's status and log."""

SUBMISSIONS = 5
"""Maximum attempts to submit a job: in each, the head waits ten seconds for its agent."""

FINAL = ("SUCCEEDED", "FAILED", "STOPPED")


def run_as_job(verb: str, request: ModelRequest, context: RunContext, live: Live | None) -> EfficiencyReport:
    """Execute a verb as a Ray job, and return its report, with the artifacts in the run's folder here.

    Raises:
        RequestError: objects of this process were given, or the project is too large to be sent.
        SetupError: Ray is not installed, or the head does not answer.
        OmgoptimError: what the run raised there.
    """
    from omgoptim.operations.execution import refuse_unreachable

    assert isinstance(request, ExecutionFields)
    refuse_unreachable(request, live)
    probe_head(request.on)
    output = free_output(request, context)
    with token_mode():
        client = _client(request.on)
        with _stopped_with_this(client, context.run_id):
            _submit(client, verb, request, context)
            log = _followed(client, context)
    return with_output(fetched(log, context), context.artifact, output)


def _client(head: str) -> Any:
    library = ray_library("job_submission")
    try:
        return library.JobSubmissionClient(head)
    except Exception as error:  # Ray's kinds: of the connection, of its version, of the token
        raise SetupError(
            f"the Ray head {head} accepts no jobs",
            str(error)[:300],
            "start it with the dashboard, set RAY_AUTH_TOKEN to its token, and install 'omgoptim[ray]' here",
        ) from error


def _submit(client: Any, verb: str, request: ModelRequest, context: RunContext) -> None:
    """Submit the run, unless its job is there already: the run was resumed."""
    with suppress(RuntimeError):  # there is none
        if str(_status(client, context.run_id)) not in ("FAILED", "STOPPED"):
            context.progress("the job continues", None)
            return
        client.delete_job(context.run_id)
    context.work.mkdir(parents=True, exist_ok=True)
    package = pack(context.project, context.work / "project.zip")
    context.progress(f"sending the project: {package}", 0.01)
    asked = request.model_dump(mode="json") | {"on": "ray", "output": None, "project": None, "python": None}
    text = json.dumps(asked).replace(f"{context.project}/", "")
    record = json.dumps(
        {"verb": verb, "request": json.loads(text), "run_id": context.run_id, "folder": str(context.folder)}
    )
    job = {
        "entrypoint": f"python -m omgoptim.jobs.ray_job {base64.urlsafe_b64encode(record.encode()).decode()}",
        "submission_id": context.run_id,
        "runtime_env": runtime_env(package.file),
    }
    for left in reversed(range(SUBMISSIONS)):  # the agents of a head that was just started are not there at once
        try:
            client.submit_job(**job)
        except RuntimeError as error:
            if not left:
                fix = "read dashboard_agent.log of the head: the port of its agent, 52365 by default, may be taken"
                raise SetupError("the Ray head did not accept the job", str(error)[:300], fix) from error
            time.sleep(2 * POLL_S)
        else:
            return


def _status(client: Any, job: str) -> str:
    status = client.get_job_status(job)
    return str(getattr(status, "value", status))


def _followed(client: Any, context: RunContext) -> str:
    """Wait until the job has ended, pass its progress on, and return its log."""
    said = ""
    while True:
        status, log = _status(client, context.run_id), str(client.get_job_logs(context.run_id))
        lines = [line for line in log.splitlines() if line.startswith(PROGRESS)]
        if lines and lines[-1] != said:
            said = lines[-1]
            with suppress(ValueError):  # cut in the middle
                stage, done = json.loads(said.removeprefix(PROGRESS))
                context.progress(f"on the cluster: {stage}", done)
        if status in FINAL:
            sys.stdout.write("\n".join(line for line in log.splitlines() if not line.startswith((PROGRESS, RESULT))))
            if status == "STOPPED":
                raise RunError("the Ray job was stopped", f"job {context.run_id}", "resume the run to submit it again")
            return log
        time.sleep(POLL_S)


def fetched(log: str, context: RunContext) -> EfficiencyReport:
    """Write the files of a job's log into the run's folder, signed as this user's.

    Raises:
        OmgoptimError: what the run raised there.
        RunError: the job ended without a result.
    """
    lines = log.splitlines()
    for line in lines:
        if line.startswith(FAILED):
            raise OmgoptimError.from_dict(json.loads(line.removeprefix(FAILED)))
    parts = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    digest, data = (parts[0], base64.b64decode("".join(parts[1:]))) if parts else ("", b"")
    if not parts or hashlib.sha256(data).hexdigest() != digest:
        tail = "\n".join(line for line in lines[-20:] if not line.startswith((PROGRESS, RESULT)))
        raise RunError("the Ray job ended without a result", f"job {context.run_id}", "read its log", tail)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        report = EfficiencyReport.model_validate_json(archive.read(REPORT))
        for name in archive.namelist():
            file = context.folder / name
            if not file.resolve().is_relative_to(context.folder.resolve()):
                raise RunError("the Ray job's result names a file outside of the run", name[:80])
            if name != REPORT:  # a run that has a report is done
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(name))
    for manifest in context.folder.glob(f"**/{MANIFEST}"):
        manifest.write_text(json.dumps(sign_record("artifact", json.loads(manifest.read_text(encoding="utf-8")))))
    for file in context.alternatives.glob("*.json"):
        write_signed_report(
            file, context.run_id, EfficiencyReport.model_validate_json(file.read_text(encoding="utf-8"))
        )
    return report


def result_lines(folder: Path, elsewhere: str, here: str) -> Iterator[str]:
    """Yield the lines that carry a finished run's report and artifacts.

    Args:
        folder: of the run.
        elsewhere: where the run lies for the one who submitted it.
        here: where it lies in this job.

    Raises:
        RunError: they are too large for a log.
    """
    files = [folder / REPORT]
    for part in ("artifact", "alternatives"):
        files += [
            file for file in sorted((folder / part).rglob("*")) if file.is_file() and not file.name.startswith(".")
        ]
    size = sum(file.stat().st_size for file in files)
    if size > MOST_BYTES:
        raise RunError(
            f"the artifacts are too large for the job's log: {size / 1e6:.0f} MB",
            f"at most {MOST_BYTES / 1e6:.0f} MB; they are in {folder} on the head",
            "copy them from there",
        )
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            data = file.read_bytes()
            if file.suffix == ".json" and file.parent in (folder, folder / "alternatives"):  # a report
                data = data.replace(here.encode(), elsewhere.encode())
            archive.writestr(file.relative_to(folder).as_posix(), data)
    text = base64.b64encode(target.getvalue()).decode()
    yield RESULT + hashlib.sha256(target.getvalue()).hexdigest()
    for start in range(0, len(text), 8000):
        yield RESULT + text[start : start + 8000]


@contextmanager
def _stopped_with_this(client: Any, job: str) -> Iterator[None]:
    """End the job with this process, when it is cancelled or fails; a kill leaves the job to a resumed run."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None

    def stop() -> None:
        with suppress(Exception):  # the head is gone, or the job has ended
            client.stop_job(job)

    if main:
        signal.signal(signal.SIGTERM, _then(stop, before))
    try:
        yield
    except BaseException:
        stop()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _then(stop: Callable[[], None], before: Any) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        if callable(before):
            before(number, frame)
        else:
            raise SystemExit(128 + number)

    return handle
