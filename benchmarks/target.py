"""What does measuring on a target cost? The same quantize here and over ssh to this machine, in turns.

The target is OpenSSH's server on 127.0.0.1 with a home folder of its own, so that both sides have the same processor
and what differs is the protocol: connections, transfers, and the time between turns. The model is an ONNX file, since
torch does not run on a target: with a torch model the run here would also time the original in torch, in a process
that takes seconds to start in every launch, and the run there would seem faster.

    python benchmarks/target.py [--repeats 3] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import bar, console, keep, machine, table

import omgoptim
from omgoptim.measure.target.client import Target
from omgoptim.measure.target.connection import CONFIG_VARIABLE

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from ssh_server import running_server  # noqa: E402  the server of the tests

LIMIT = 1.3
"""Bar: seconds there, less the transfers, over seconds here."""


class Transfers:
    """Seconds and bytes of what goes to a target."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        send = Target.send_contents

        def clocked(target: Target, contents: Any) -> None:
            began = time.perf_counter()
            send(target, contents)
            self.seconds += time.perf_counter() - began
            self.bytes += sum(path.stat().st_size for path in contents.values())

        Target.send_contents = clocked  # type: ignore[method-assign]

    def take(self) -> tuple[float, int]:
        taken = self.seconds, self.bytes
        self.seconds, self.bytes = 0.0, 0
        return taken


def quantize(timing: str, seed: int, target: str | None) -> tuple[float, float]:
    """Return seconds and quality of one run."""
    began = time.perf_counter()
    report = omgoptim.quantize(
        "digits_cnn.onnx", data="digits_cnn.py:load", scheme="static", runtime="onnxruntime", timing=timing,
        seed=seed, target=target, progress=False,
    )  # fmt: skip
    assert report.after is not None
    return time.perf_counter() - began, report.after.quality or 0.0


def export(path: Path) -> None:
    """Write the example network as an ONNX file with a dynamic batch."""
    sys.path.append(str(ROOT / "examples"))
    from digits_cnn import build

    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(build(), (torch.zeros(2, 1, 32, 32),), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    began, transfers, rows = machine(), Transfers(), []
    timing, repeats = ("quick", 1) if options.quick else ("standard", options.repeats)
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "server") as server:
        project = Path(folder) / "project"
        project.mkdir()
        for name in ("digits_cnn.py", "digits_cnn.safetensors"):
            (project / name).write_bytes((ROOT / "examples" / name).read_bytes())
        os.chdir(project)
        export(project / "digits_cnn.onnx")
        os.environ |= {"OMGOPTIM_PROJECT": str(project), CONFIG_VARIABLE: str(server.config)}
        quantize("quick", options.seed, server.url)  # imports, and what goes over once
        for _ in range(repeats):
            here, quality = quantize(timing, options.seed, None)
            transfers.take()
            there, quality_there = quantize(timing, options.seed, server.url)
            seconds, sent = transfers.take()
            rows.append(
                {
                    "here_s": here, "there_s": there, "transfers_s": seconds, "offered_bytes": sent,
                    "ratio": (there - seconds) / here, "quality_here": quality, "quality_there": quality_there,
                }
            )  # fmt: skip
    columns = list(rows[0])
    table("quantize here and on a target", ["run", *columns], [[str(n), *row.values()] for n, row in enumerate(rows)])
    judged = bar("there, less transfers / here", statistics.median(row["ratio"] for row in rows), LIMIT, at_least=False)
    same = all(row["quality_here"] == row["quality_there"] for row in rows)
    console.print(f"quality is the same: {same}")
    keep("target", options.seed, options.quick, began, {"bars": [judged], "runs": rows, "same_quality": same})


if __name__ == "__main__":
    main()
