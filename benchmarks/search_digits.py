"""`python benchmarks/search.py --part real`: searches of the digits space against random search, measured here.

Each seed is one run of `search` with `control="random"`: as many random trials with the same rejection and halving.
Both end at the same target of measured latency; their best is compared on the evaluation data.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from record import bar, console, keep, machine, table

import omgoptim

EXAMPLES = Path(__file__).parents[1] / "examples"
SPEEDUP = 3.0
LATENCY_ERROR = 0.15
"""Bar: median error of the latency that was predicted for a trial against what was measured."""


def one_seed(seed: int, trials: int, epochs: int) -> dict[str, Any]:
    """Search once; returns qualities on the evaluation data and the errors of the predictions."""
    report = omgoptim.search(
        "digits_cnn.py:build",
        "digits_space.py:space",
        data="digits_cnn.py:load",
        project=str(EXAMPLES),
        target_speedup=SPEEDUP,
        trials=trials,
        epochs=epochs,
        control="random",
        max_quality_drop=1.0,
        seed=seed,
        timing="quick",
    )
    qualities = {one.candidate: one.quality for one in report.alternatives}
    delivered = next(one.name for one in report.candidates if one.status == "chosen")
    qualities[delivered] = report.after.quality if report.after else None
    chosen_by_rule = max(
        (one for one in report.candidates if one.name in qualities and not one.name.startswith("random")),
        key=lambda one: one.quality or 0.0,
    )
    control = next(one for one in report.candidates if one.name in qualities and one.name.startswith("random"))
    run = EXAMPLES / ".omgoptim" / "runs" / report.run_id / "search"
    results = [json.loads(file.read_text()) for file in run.glob("**/trials/*/result.json")]
    errors = [
        abs(one["predicted_ms"] - one["measured_ms"]) / one["measured_ms"]
        for one in results
        if one["predicted_ms"] and one["measured_ms"]
    ]
    return {
        "seed": seed,
        "run_id": report.run_id,
        "search": qualities[chosen_by_rule.name],
        "random": qualities[control.name],
        "search_on_selection": chosen_by_rule.quality,
        "random_on_selection": control.quality,
        "rejected": sum(one["outcome"] == "rejected" for one in results),
        "load_of_others": report.environment.load,
        "latency_errors": errors,
    }


def on_digits(seeds: int, trials: int, epochs: int, quick: bool) -> int:
    """Run all seeds; returns how many bars were missed."""
    began = machine()
    found = [one_seed(seed, trials, epochs) for seed in range(seeds)]
    columns = ("seed", "search", "random", "on selection", "random there", "rejected")
    keys = ("search", "random", "search_on_selection", "random_on_selection", "rejected")
    rows = [(str(one["seed"]), *(one[key] for key in keys)) for one in found]
    table(f"digits, {trials} trials of up to {epochs} epochs, speedup {SPEEDUP:g}", columns, rows)
    gain = statistics.mean(one["search"] - one["random"] for one in found)
    error = statistics.median(error for one in found for error in one["latency_errors"])
    bars = [
        bar("mean gain in quality over random search", gain, 0.0, at_least=True),
        bar("median error of the predicted latency", error, LATENCY_ERROR, at_least=False),
    ]
    keep("search_digits", 0, quick, began, {"trials": trials, "epochs": epochs, "seeds": found, "bars": bars})
    console.print(f"mean gain {gain:+.4f}, median error {error:.1%}")
    return sum(not each["held"] for each in bars)
