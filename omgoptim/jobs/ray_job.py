"""Driver of a Ray job on the cluster: one run in the project that was sent, its result as lines of the log.

python -m omgoptim.jobs.ray_job RECORD      # verb, request and run id: JSON in URL-safe base64
"""

from __future__ import annotations

import base64
import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from omgoptim.jobs.folder import RunFolder, runs_root
from omgoptim.jobs.interpreter import Interpreter
from omgoptim.jobs.states import load_report
from omgoptim.jobs.submit import write_first
from omgoptim.jobs.worker import execute
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Request, parse


def main(text: str) -> int:
    """Execute the run of a record; return the exit status of the job."""
    from omgoptim.errors import OmgoptimError
    from omgoptim.operations import run_verb
    from omgoptim.operations.context import RunContext
    from omgoptim.operations.ray_job import FAILED, PROGRESS, result_lines

    record: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text))
    project = Path.cwd().resolve()
    os.environ.setdefault("OMGOPTIM_STATE_DIR", str(project / ".omgoptim" / "state"))  # nothing in the home folder
    folder = RunFolder(runs_root(project) / record["run_id"])
    folder.path.mkdir(parents=True, exist_ok=True)
    here = Interpreter(Path(sys.executable), "the Ray job's Python", platform.python_version(), ())
    write_first(folder, record["verb"], parse(record["verb"], record["request"]), project, here)

    def operation(verb: str, request: Request, context: RunContext) -> EfficiencyReport:
        def progress(stage: str, done: float | None) -> None:
            context.progress(stage, done)
            _say(PROGRESS + json.dumps([stage, done]))

        return run_verb(verb, request, replace(context, progress=progress))

    execute(folder, operation)
    try:
        load_report(folder)
        lines = list(result_lines(folder.path, record["folder"], str(folder.path)))
    except OmgoptimError as error:
        _say(FAILED + json.dumps(error.to_dict()))
        return 1
    _say("\n".join(lines))
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"\n{text}\n")  # whatever the user's code left unfinished ends before it
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
