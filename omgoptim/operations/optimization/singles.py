"""Steps of `optimize` that do not depend on each other, taken at the same time on Ray.

Each times its result, so each holds a machine of the resource `omgoptim_timing` with all of its cores: on one machine
they follow each other, on a cluster they do not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from omgoptim.errors import SetupError
from omgoptim.executors import Task, executor_on
from omgoptim.operations.optimization.steps import Steps
from omgoptim.requests import parse

FUNCTION = "omgoptim.jobs.step_runs:run_step_task"


def take_on_ray(steps: Steps, asked: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Take steps from the original; `Steps.take` finds each of them done, and takes itself what failed.

    Where no machine of a cluster may measure time, nothing is done here.

    Args:
        steps: of the run.
        asked: verb and arguments of each.

    Raises:
        SetupError: Ray does not start.
    """
    began, context = time.monotonic(), steps.context
    place = context.work / "singles"
    place.mkdir(parents=True, exist_ok=True)
    with executor_on("ray", steps.request.workers, context.project, context.progress) as executor:
        assert executor is not None
        futures = []
        for verb, arguments in asked:
            key, whole = steps.named(verb, arguments)
            if steps.ledger.get(key) is None:
                folder = context.begin_step(key, verb, parse(verb, whole))
                task = Task(FUNCTION, {"folder": str(folder)}, place / key, timing=True)
                try:
                    futures.append(executor.submit(task))
                except SetupError as error:
                    context.progress(f"{error.what}: the steps follow each other here", None)
                    break
        context.progress(f"taking {len(futures)} steps on Ray", None)
        for future in futures:
            future.exception()  # the step's own run has its error
    steps.budget_s -= time.monotonic() - began
