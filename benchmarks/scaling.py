"""How does `search` scale with workers: here with 1 and 2, by arithmetic and simulation up to 100?

Each part is a search of its own on digits, with the same seed and trials in flight: by one worker, by two processes,
and by two workers of a local Ray; with trials of a few seconds, where the driver's export and timing weigh most, and
with longer ones. From the trials' folders come the seconds of training and of the driver; a simulation of many workers
draws from those.

    python benchmarks/scaling.py [--trials 8] [--epochs 54 216] [--proposals 6] [--quick]
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from record import bar, console, keep, machine, table

PROPOSALS = 6
"""Trials in flight, the default of two workers; the same for one, so that the trials are the same."""

SPEEDUP = 1.7
"""Bar: trials per minute of two workers over those of one."""

EXAMPLES = Path(__file__).parents[1] / "examples"
WORKERS = (1, 2, 4, 8, 16, 32, 64, 100)

FIRST_TASK = """
import os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "nothing.py").write_text("def run(payload, work): pass")
os.environ["PYTHONPATH"] = str(folder)
began = time.monotonic()
from omgoptim.executors import Task
from omgoptim.executors.ray import RayExecutor
executor = RayExecutor(2, folder, lambda stage, done: None)
times = [time.monotonic()]
try:
    for name in ("first", "second"):
        executor.submit(Task("nothing:run", {}, folder / name)).result()
        times.append(time.monotonic())
finally:
    executor.close()
print(times[0] - began, times[1] - times[0], times[2] - times[1])
"""


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search took."""

    seconds: float
    """From the first trial's start to the last trial's end, as the study's journal has them."""
    training_s: list[float]
    sent_bytes: float
    """Of a task: the request and the trial's spec, in JSON."""
    returned_bytes: float
    """Of a network, about its weights: what comes back where the run's folder is not shared."""
    best: list[str]
    """The configurations that were trained to the end, the delivered one first."""
    configurations: list[str]


def searched(place: Path, trials: int, epochs: int, options: list[str], proposals: int) -> Searched:
    """Search in a folder of its own by the command line."""
    project = place / "-".join(option.strip("-") for option in options)
    project.mkdir()
    for name in ("digits_space.py", "digits_cnn.py"):
        (project / name).write_text((EXAMPLES / name).read_text())
    command = [sys.executable, "-m", "omgoptim.cli", "search", "digits_space.py:space", "--data", "digits_cnn.py:load"]
    command += ["--target-size-mb", "0.2", "--trials", str(trials), "--epochs", str(epochs), "--threads", "1"]
    command += ["--timing", "quick", "--proposals", str(proposals), "--max-quality-drop", "1", *options]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr[-2000:])
    [run] = (project / ".omgoptim" / "runs").iterdir()
    folders = sorted((run / "search" / "trials").glob("[0-9]" * 5))
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    report = json.loads((run / "report.json").read_text())
    chosen = [each["why"] for each in report["candidates"] if each["status"] in ("chosen", "finalist")]
    asked = (run / "request.json").stat().st_size
    return Searched(
        seconds=_trials_seconds(run / "events.jsonl"),
        training_s=[result["seconds"] for result in results],
        sent_bytes=float(np.mean([asked + (folder / "spec.json").stat().st_size for folder in folders])),
        returned_bytes=float(np.mean([result["size_bytes"] for result in results if result["size_bytes"]])),
        best=[why.partition("; predicted")[0] for why in chosen],
        configurations=[
            json.dumps(json.loads((folder / "spec.json").read_text())["configuration"]) for folder in folders
        ],
    )


def _trials_seconds(events: Path) -> float:
    """Seconds from the first trial until the best ones begin to be trained to the end."""
    entries = [json.loads(line) for line in events.read_text().splitlines()]
    times: dict[str, list[datetime]] = {"trial": [], "end": []}
    for entry in entries:
        stage = str(entry.get("stage", ""))
        kind = "trial" if stage.startswith("trial ") else "end" if stage.startswith("training the best") else None
        if kind:
            times[kind].append(datetime.fromisoformat(entry["t"]))
    return (times["end"][0] - times["trial"][0]).total_seconds()


def simulated(training_s: list[float], timing_s: float, workers: int, trials: int, seed: int) -> tuple[float, float]:
    """Return the minutes of a search, and the share of them in which the timing device works.

    Trials are proposed in order, three per worker at a time; each is timed on the one device before its training.
    """
    random = np.random.default_rng(seed)
    device = 0.0
    free = [0.0] * workers
    heapq.heapify(free)
    ends: list[float] = []
    for number in range(trials):
        begin = max(device, ends[number - 3 * workers] if number >= 3 * workers else 0.0)
        device = begin + timing_s
        start = max(device, heapq.heappop(free))
        end = start + float(random.choice(training_s))
        heapq.heappush(free, end)
        ends.append(max(end, ends[-1] if ends else 0.0))
    return ends[-1] / 60, trials * timing_s / ends[-1]


def started() -> list[float]:
    """Seconds until Ray is there, its first task has ended, and its second."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", FIRST_TASK, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()[-3:]]


def compared(trials: int, epochs: int, proposals: int) -> dict[str, Searched]:
    """Search by one worker, by two processes, and by two workers of Ray."""
    ways = {"1 worker": ["--workers", "1"], "2 processes": ["--workers", "2"]}
    ways["2 workers of Ray"] = ["--on", "ray", "--workers", "2"]
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, options in ways.items():
            began = time.monotonic()
            found[name] = searched(Path(place), trials, epochs, options, proposals)
            console.print(f"{epochs} epochs, {name}: {time.monotonic() - began:.0f} s in all")
    return found


def rated(found: dict[str, Searched], trials: int, epochs: int) -> dict[str, Any]:
    """Return the record of a comparison."""
    rates = {name: 60 * trials / each.seconds for name, each in found.items()}
    alone = found["1 worker"]
    training = found["2 processes"].training_s
    seconds = float(np.mean([each for each in training if each > 0.01]))  # without the trials that were not trained
    rows = [[name, rate, rate / rates["1 worker"]] for name, rate in rates.items()]
    table(f"trials of {epochs} epochs, {seconds:.0f} s each", ["", "trials/min", "ratio"], rows)
    return {
        "epochs": epochs,
        "seconds_a_trial": seconds,
        "rates": rates,
        "ratio": rates["2 processes"] / rates["1 worker"],
        "ratio_ray": rates["2 workers of Ray"] / rates["1 worker"],
        "same_trials": all(each.configurations == alone.configurations for each in found.values()),
        "same_finalists": all(sorted(each.best) == sorted(alone.best) for each in found.values()),
        "training_s": training,
        "driver_s": max(0.0, alone.seconds / trials - float(np.mean(training))),
    }


def main() -> None:
    """Measure, simulate, and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, nargs="+", default=[54, 216], help="the first ones decide the bar")
    parser.add_argument("--proposals", type=int, default=PROPOSALS, help="trials in flight")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    trials, lengths = (4, [9]) if asked.quick else (asked.trials, asked.epochs)
    os.environ.setdefault("OMGOPTIM_STATE_DIR", tempfile.mkdtemp())
    before = machine()
    found = [compared(trials, epochs, asked.proposals) for epochs in lengths]
    parts = [rated(each, trials, epochs) for each, epochs in zip(found, lengths, strict=True)]
    alone = found[0]["1 worker"]
    record: dict[str, Any] = {"trials": trials, "proposals": asked.proposals, "parts": parts}
    what = f"two processes over one, trials of {parts[0]['seconds_a_trial']:.0f} s"
    record["bar"] = bar(what, parts[0]["ratio"], SPEEDUP, at_least=True)
    record["sent_bytes"], record["returned_bytes"] = alone.sent_bytes, alone.returned_bytes
    names = ("until Ray is there", "first task", "second task")
    record["ray_s"] = dict(zip(names, started(), strict=True))
    for part in parts:
        rows: list[list[Any]] = []
        for workers in WORKERS:
            minutes, busy = simulated(part["training_s"], part["driver_s"], workers, 400, seed=0)
            rows.append([str(workers), minutes, (rows[0][1] if rows else minutes) / minutes, busy])
        heading = f"400 trials of {part['seconds_a_trial']:.0f} s, simulated"
        table(heading, ["workers", "minutes", "speed-up", "timing device busy"], rows)
        part["simulated"] = rows
    keep("scaling", 0, asked.quick, before, record)


if __name__ == "__main__":
    main()
