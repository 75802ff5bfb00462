"""A run in the caller's own process, for the Python face: the same folder, states and locks, no worker."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.interpreter import Interpreter
from omgoptim.jobs.states import load_report
from omgoptim.jobs.submit import open_run
from omgoptim.jobs.worker import execute
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Request

if TYPE_CHECKING:
    from omgoptim.operations.context import RunContext

    Operation = Callable[[Request, RunContext], EfficiencyReport]


def run_inline(
    verb: str,
    request: Request,
    project: Path,
    operation: Operation,
    watch: Callable[[RunFolder], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> EfficiencyReport:
    """Do a run here and now.

    Args:
        verb: of the run.
        request: of that verb.
        project: that the run's folder is made in.
        operation: does what the request asks.
        watch: gives a context that is open while the run goes on, for instance to show where it stands.

    Raises:
        OmgoptimError: what the operation raised; the run's folder has it too.
    """
    here = Interpreter(Path(sys.executable), "the caller's own process", platform.python_version(), ())
    folder = open_run(verb, request, project, here)
    with _callers_torch(), watch(folder):
        execute(folder, lambda _verb, resolved, context: operation(resolved, context), owns_process=False)
    return load_report(folder)


@contextmanager
def _callers_torch() -> Iterator[None]:
    """Leave torch's random state and its number of threads as the caller had them: a run sets both."""
    import torch

    threads, random = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
