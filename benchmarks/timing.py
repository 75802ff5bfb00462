"""Is the timing calibrated? A model against itself, and against itself with 5 % more work, many times over.

A comparison is a handful of launches, and a launch is independent of the next. So real launches are measured once, each
with three processes that take turns: the model, the model again, and the model with 42 blocks instead of 40. Then
comparisons are drawn from this pool without replacement and go through omgoptim's own plan with its stopping rule:

    false alarms   the interval of the model against itself excludes 1
    detection      the interval of 5 % more work lies below 1
    coverage       an interval holds the true ratio: 1, and the whole pool's own ratio for 5 % more work

Draws share launches, so that a rate is only as sure as the number of comparisons that could be drawn without sharing
any: that number stands beside it.

    python benchmarks/timing.py [--minutes 5] [--engines torch_eager onnxruntime] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blocks
import numpy as np
import torch
from record import console, keep, machine, table

from omgoptim.errors import OmgoptimError
from omgoptim.hardware import usable_cores
from omgoptim.measure.launch import LATENCY, TimingPlan
from omgoptim.measure.measuring_process import TimingSetup
from omgoptim.measure.timing import PLANS, SCREENING_PLAN, Timing, has_converged, t_interval, time_artifacts
from omgoptim.models.artifact import save_module, save_program
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature

HERE = Path(__file__).parent
BASE, MORE = 40, 42
TRIALS = 2000
FEWEST, FEWEST_QUICK = 40, 8
"""Launches that are made however long they take."""
PLANS_SHOWN = {
    "standard": PLANS["standard"],
    "careful": PLANS["careful"],
    "always 5": replace(PLANS["standard"], most_launches=5),
    "always 8": replace(PLANS["standard"], launches=8),
}
SIGNATURE = Signature((InputTensor("x", "float32", (BATCH, blocks.WIDTH), False),), "tensor")


@dataclass(frozen=True, slots=True)
class Pool:
    """Log ratios of real launches, over the same model: itself, and 5 % more work."""

    same: list[float]
    more: list[float]
    latency_ms: float


def artifact(folder: Path, engine: str, count: int) -> Path:
    """The model with `count` blocks as an artifact of an engine."""
    module = blocks.build(count)
    x = torch.randn(2, blocks.WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        check = OutputCheck({"x": x.numpy()}, [module(x).numpy()])
    target, manifest = folder / f"{engine}-{count}", Manifest(engine, "float32", SIGNATURE)
    if engine == "torch_eager":
        save_module(
            target, module, Recipe("callable", "blocks.py:build", {"blocks": count}, str(HERE)), manifest, check
        )
    else:
        program = folder / f"{count}.scratch" / "model.onnx"
        program.parent.mkdir(exist_ok=True)
        export_onnx(module, {"x": x}, SIGNATURE, program)
        save_program(target, program, manifest, check)
    return target


def measure(engine: str, folder: Path, seconds: float, fewest: int, seed: int) -> Pool:
    """Launches for about `seconds`, at least `fewest`."""
    np.savez(folder / "latency.npz", x=np.zeros((1, blocks.WIDTH), np.float32))
    bench = TimingSetup({LATENCY: folder / "latency.npz"}, batch=1, threads=usable_cores(), cwd=HERE)
    base, more = (artifact(folder, engine, count) for count in (BASE, MORE))
    plan = replace(SCREENING_PLAN, rounds=PLANS["standard"].rounds)
    pool, latencies, end = Pool([], [], 0.0), [], time.monotonic() + seconds
    while len(pool.same) < fewest or time.monotonic() < end:
        first, same, other = time_artifacts([base, base, more], bench, plan, seed + len(pool.same))
        for timing, ratios in ((same, pool.same), (other, pool.more)):
            ratios.append(math.log(speedup(timing)))
        latencies.append(first.latency_ms_p50 if isinstance(first, Timing) else math.nan)
        if len(pool.same) % 10 == 0:
            console.print(
                f"[dim]{engine}: {len(pool.same)} launches, {max(0.0, end - time.monotonic()):.0f} s to go[/]"
            )
    return replace(pool, latency_ms=statistics.median(latencies))


def speedup(timing: Timing | OmgoptimError) -> float:
    if isinstance(timing, OmgoptimError):
        raise timing
    if timing.speedup is None:
        raise ValueError("a challenger has a ratio")
    return timing.speedup.value


def draw(pool: list[float], plan: TimingPlan, order: random.Random) -> list[float]:
    """The launches of one comparison, as many as the plan's stopping rule takes."""
    drawn = order.sample(pool, min(plan.most_launches, len(pool)))
    count = next((n for n in range(1, len(drawn)) if has_converged([drawn[:n]], n, plan)), len(drawn))
    return drawn[:count]


def calibrate(values: list[float], truth: float, plan: TimingPlan, trials: int, seed: int) -> dict[str, float]:
    """What `trials` comparisons drawn from a pool say of a log ratio `truth`."""
    order = random.Random(seed)
    draws = [draw(values, plan, order) for _ in range(trials)]
    intervals = [t_interval(drawn) for drawn in draws]
    launches = statistics.fmean(map(len, draws))
    return {
        "faster": sum(centre - half > 0 for centre, half in intervals) / trials,
        "slower": sum(centre + half < 0 for centre, half in intervals) / trials,
        "coverage": sum(abs(centre - truth) <= half for centre, half in intervals) / trials,
        "half_width_percent": 100 * statistics.median(math.expm1(half) for _, half in intervals),
        "launches": launches,
        "without_sharing": len(values) / launches,
    }


def of_pool(engine: str, pool: Pool, trials: int, seed: int) -> dict[str, Any]:
    """The rates of every plan, printed and returned."""
    result: dict[str, Any] = {"launches": len(pool.same), "latency_ms_p50": pool.latency_ms, "plans": {}}
    for name, values in (("same", pool.same), ("more", pool.more)):
        centre, half = t_interval(values)
        low, high = math.exp(centre - half), math.exp(centre + half)
        result[name] = {
            "ratio": math.exp(centre),
            "low": low,
            "high": high,
            "sd_percent": 100 * statistics.stdev(values),
        }
    for name, plan in PLANS_SHOWN.items():
        if plan.most_launches <= len(pool.same):
            result["plans"][name] = {
                "same": calibrate(pool.same, 0.0, plan, trials, seed),
                "more": calibrate(pool.more, math.log(result["more"]["ratio"]), plan, trials, seed),
            }
    show(engine, result)
    result["log_ratios"] = {"same": pool.same, "more": pool.more}
    return result


def show(engine: str, result: dict[str, Any]) -> None:
    said = [
        f"{words} {result[name]['ratio']:.4f} ({result[name]['low']:.4f} to {result[name]['high']:.4f})"
        for name, words in (("same", "against itself"), ("more", "with 5 % more work"))
    ]
    title = f"{engine}: {result['launches']} launches of {result['latency_ms_p50']:.2f} ms; {'; '.join(said)}"
    columns = ("plan", "false alarms", "5 % found", "coverage", "of 5 %", "half-width", "launches", "without sharing")
    rows = []
    for name, rates in result["plans"].items():
        same, more = rates["same"], rates["more"]
        shares = (same["faster"] + same["slower"], more["slower"], same["coverage"], more["coverage"])
        width, unshared = f"{same['half_width_percent']:.2f} %", f"{same['without_sharing']:.0f}"
        rows.append((name, *(f"{share:.1%}" for share in shares), width, f"{same['launches']:.1f}", unshared))
    table(title, columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Is the timing calibrated?")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for all launches (default 5)")
    parser.add_argument("--engines", nargs="+", default=["torch_eager", "onnxruntime"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run: a few launches, no claim")
    parser.add_argument("--from-result", type=Path, help="draw again from the launches that a result file holds")
    asked = parser.parse_args()
    began = machine()
    trials = 200 if asked.quick else TRIALS
    engines: dict[str, Any] = {}
    if asked.from_result:
        for engine, stored in json.loads(asked.from_result.read_text())["engines"].items():
            engines[engine] = of_pool(
                engine, Pool(**stored["log_ratios"], latency_ms=stored["latency_ms_p50"]), trials, asked.seed
            )
        return
    for engine in asked.engines:
        with tempfile.TemporaryDirectory(prefix="omgoptim-timing-") as folder:
            seconds = 0.0 if asked.quick else 60 * asked.minutes / len(asked.engines)
            pool = measure(engine, Path(folder), seconds, FEWEST_QUICK if asked.quick else FEWEST, asked.seed)
        engines[engine] = of_pool(engine, pool, trials, asked.seed)
    keep("timing", asked.seed, asked.quick, began, {"trials": trials, "blocks": [BASE, MORE], "engines": engines})


if __name__ == "__main__":
    main()
