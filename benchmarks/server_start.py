"""How long until the server answers? omgoptim's stdio server against a bare one with as many tools.

Time from starting the process to its answer to `initialize`, launches in turns, which of the two goes first drawn
at random; the ratio is that of the medians, its interval from resampled rounds.

    python benchmarks/server_start.py [--launches 15] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import bar, console, keep, machine, table

HERE = Path(__file__).parent
BAR = 1.4
ERA = "2025-11-25"


@dataclass(frozen=True, slots=True)
class Started:
    """One launch: seconds to the answer, and the tools that were then listed."""

    seconds: float
    tools: int


def start(command: list[str], project: Path) -> Started:
    """Launch a server, initialize, list its tools, and end it."""
    hello = {"protocolVersion": ERA, "capabilities": {}, "clientInfo": {"name": "benchmark", "version": "1"}}
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMGOPTIM_PROJECT": str(project)}
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=project, env=environment
    ) as process:
        try:
            ask(process, 1, "initialize", hello)
            seconds = time.perf_counter() - began
            tell(process, {"method": "notifications/initialized"})
            tools = ask(process, 2, "tools/list", {})["tools"]
        finally:
            process.kill()
    return Started(seconds, len(tools))


def ask(process: subprocess.Popen[str], number: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Send a request and read until its answer."""
    tell(process, {"id": number, "method": method, "params": params})
    for line in process.stdout or ():
        answer = json.loads(line)
        if answer.get("id") == number:
            result: dict[str, Any] = answer["result"]
            return result
    raise SystemExit(f"the server ended before it answered {method}")


def tell(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    if process.stdin is None:
        raise RuntimeError("the server has no input pipe")
    process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    process.stdin.flush()


def interval(ours: list[float], bare: list[float], order: random.Random) -> tuple[float, float]:
    """95 % interval of the ratio of medians: percentile bootstrap over rounds."""
    ratios = []
    for _ in range(2000):
        rounds = order.choices(range(len(ours)), k=len(ours))
        ratios.append(statistics.median(ours[i] for i in rounds) / statistics.median(bare[i] for i in rounds))
    cuts = statistics.quantiles(ratios, n=40)
    return cuts[0], cuts[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="How long until the server answers?")
    parser.add_argument("--launches", type=int, default=15, help="of each server (default 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run: three launches, no claim")
    asked = parser.parse_args()
    launches, order, began = 3 if asked.quick else asked.launches, random.Random(asked.seed), machine()
    seconds: dict[str, list[float]] = {"omgoptim": [], "bare": []}
    with tempfile.TemporaryDirectory(prefix="omgoptim-start-") as folder:
        project = Path(folder)
        ours = [sys.executable, "-m", "omgoptim.server"]
        tools = start(ours, project).tools  # also fills the bytecode caches of both
        commands = {"omgoptim": ours, "bare": [sys.executable, str(HERE / "bare_server.py"), str(tools)]}
        if start(commands["bare"], project).tools != tools:
            raise SystemExit("the bare server lists another number of tools")
        for _ in range(launches):
            for name in order.sample(list(commands), 2):
                seconds[name].append(start(commands[name], project).seconds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        (name, f"{medians[name]:.3f}", f"{min(values):.3f}", f"{max(values):.3f}") for name, values in seconds.items()
    ]
    table(
        f"seconds to the answer to initialize, {launches} launches, {tools} tools", ("", "median", "min", "max"), rows
    )
    low, high = interval(seconds["omgoptim"], seconds["bare"], order)
    judged = bar("omgoptim / bare server", medians["omgoptim"] / medians["bare"], BAR, at_least=False)
    console.print(f"95 % interval of the ratio: {low:.3f} to {high:.3f}")
    result = {"tools": tools, "medians_s": medians, "seconds": seconds, "interval": [low, high], "bars": [judged]}
    keep("server_start", asked.seed, asked.quick, began, result)


if __name__ == "__main__":
    main()
