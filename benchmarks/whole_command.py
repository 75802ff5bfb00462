"""`omgoptim quantize` in a process of its own, and how much of its time was spent inside `time_artifacts`.

python benchmarks/whole_command.py REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import omgoptim
from omgoptim.operations import timing
from omgoptim.operations.quantization import screening

spent = {"measuring_s": 0.0, "waiting_s": 0.0}


def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time added to what is spent on `name`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start

    return run


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    screening.time_artifacts = clocked("measuring_s", screening.time_artifacts)
    timing.time_artifacts = clocked("measuring_s", timing.time_artifacts)
    timing._wait_until_idle = clocked(
        "waiting_s", timing._wait_until_idle
    )  # for other programs to let go of the machine
    report = omgoptim.quantize(request.pop("model"), **request)
    Path(sys.argv[2]).write_text(json.dumps({"report": report.model_dump(mode="json"), **spent}))


if __name__ == "__main__":
    main()
