"""Does the proposal rule of `search` beat random search on a public table, at 20 and 40 trials?

NAS-Bench-Macro (github.com/xiusu/NAS-Bench-Macro, Apache-2.0): 6,561 networks of eight layers with three choices each,
trained on CIFAR-10 with three seeds. FLOPs stand in for latency. A trial returns the
accuracy of one seed; a search ends with the trial of the best accuracy it saw, and is judged by the mean of the three.
The table is not in the repository: without it there is nothing to run.

    python benchmarks/search.py --part table --table nas-bench-macro_cifar10.json [--quick]
    python benchmarks/search.py --part real [--trials 24] [--epochs 18] [--seeds 3] [--quick]    see search_digits.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import bar, console, keep, machine, table

from omgoptim.architecture_search.propose import Observations, Proposer, propose, propose_random
from omgoptim.architecture_search.space import Knob, Space

VARIABLE = "OMGOPTIM_NAS_TABLE"
LIMITS = (48e6, 59e6)
TRIALS = (20, 40)
AGAINST_PLAIN, AGAINST_REJECTING = 0.97, 0.9
"""Bars: how often the mean of three searches by the rule is above that of three random ones."""

SPACE = Space(tuple(Knob(f"layer{number}", (0, 1, 2)) for number in range(8)))
PLACES = 3 ** np.arange(7, -1, -1)
"""A row of `SPACE.every` at its own number."""


@dataclass(frozen=True, slots=True)
class Networks:
    """The table, in the order of `SPACE.every`."""

    flops: NDArray[np.float64]
    accuracies: NDArray[np.float64]
    """Of three seeds, in percent, shape [networks, 3]."""

    @classmethod
    def read(cls, path: Path) -> Networks:
        found = json.loads(path.read_text())
        records = [found["".join(map(str, row))] for row in SPACE.every.tolist()]
        return cls(
            np.array([record["flops"] for record in records], dtype=np.float64),
            np.array([record["test_acc"] for record in records], dtype=np.float64),
        )


def by_proposals(networks: Networks, way: Proposer, limit: float, trials: int, seed: int) -> float:
    """Mean accuracy of the network that a search ends with."""
    luck = np.random.default_rng([seed, 1])
    seen = Observations.none(SPACE)
    for number in range(trials):
        row = way(SPACE, lambda rows: networks.flops[rows @ PLACES] / limit, seen, seed, number)
        assert row is not None
        quality = networks.accuracies[int(row @ PLACES), luck.integers(3)]
        seen = Observations(np.vstack([seen.rows, row]), np.append(seen.qualities, quality), seen.excluded)
    return float(networks.accuracies[int(seen.rows[np.argmax(seen.qualities)] @ PLACES)].mean())


def by_plain_random(networks: Networks, limit: float, trials: int, seed: int) -> float:
    """The same for random search that learns of the FLOPs only after training; nan when nothing was within."""
    luck = np.random.default_rng([seed, 2])
    drawn = luck.choice(SPACE.size, trials, replace=False)
    qualities = networks.accuracies[drawn, luck.integers(3, size=trials)]
    inside = networks.flops[drawn] <= limit
    if not inside.any():
        return float("nan")
    return float(networks.accuracies[drawn[inside][np.argmax(qualities[inside])]].mean())


def by_tpe(networks: Networks, limit: float, trials: int, seed: int) -> float:
    """The same for TPE with rejection, as a conditional space is searched."""
    from omgoptim.architecture_search.study import Finished, Rejected, Search, SearchSettings

    luck = np.random.default_rng([seed, 1])
    search = Search(SearchSettings(seed=seed))
    best, accuracy, done = -np.inf, float("nan"), 0
    known: dict[int, float] = {}
    while done < trials:
        trial = search.ask_sampler()
        row = np.array([trial.suggest_categorical(knob.name, knob.options) for knob in SPACE.knobs])
        place = int(row @ PLACES)
        load = networks.flops[place] / limit
        if load > 1.0:
            search.reject(trial, Rejected({"latency": load}))
            continue
        if place not in known:
            done += 1
            known[place] = float(networks.accuracies[place, luck.integers(3)])
        if known[place] > best:
            best, accuracy = known[place], float(networks.accuracies[place].mean())
        search.finish(trial, Finished((known[place],), {"latency": load}))
    return accuracy


def chance(ours: list[float], others: list[float]) -> float:
    """How often the mean of three searches of ours is above that of three others, over 4,000 draws each."""
    generator = np.random.default_rng(0)

    def means(results: list[float]) -> NDArray[np.float64]:
        found = np.array([result for result in results if not np.isnan(result)])
        drawn: NDArray[np.float64] = found[generator.integers(len(found), size=(4000, 3))].mean(axis=1)
        return drawn

    return float((means(ours) > means(others)).mean())


def compare(networks: Networks, limit: float, trials: int, repetitions: int, seed: int) -> dict[str, Any]:
    """One limit and number of trials: every way to search, repeated."""
    ways: dict[str, Callable[[int], float]] = {
        "random": lambda at: by_plain_random(networks, limit, trials, at),
        "random, rejecting": lambda at: by_proposals(networks, propose_random, limit, trials, at),
        "TPE, rejecting": lambda at: by_tpe(networks, limit, trials, at),
        "the rule": lambda at: by_proposals(networks, propose, limit, trials, at),
    }
    results, seconds = {}, {}
    for name, search in ways.items():
        began = time.perf_counter()
        results[name] = [search(1000 * seed + number) for number in range(repetitions)]
        seconds[name] = (time.perf_counter() - began) / repetitions
    inside = networks.flops <= limit
    best = float(networks.accuracies[inside].mean(axis=1).max())
    summary = {
        name: {
            "repetitions": len(found),
            "mean": float(np.nanmean(found)),
            "standard_deviation": float(np.nanstd(found)),
            "regret": best - float(np.nanmean(found)),
            "nothing_within": int(np.isnan(found).sum()),
            "above_random": chance(found, results["random"]),
            "above_rejecting_random": chance(found, results["random, rejecting"]),
            "seconds": seconds[name],
        }
        for name, found in results.items()
    }
    return {"limit_mflops": limit / 1e6, "trials": trials, "best_within": best, "ways": summary}


def on_table(path: Path, repetitions: int, seed: int, quick: bool) -> int:
    """Run the whole protocol; returns how many bars were missed."""
    began = machine()
    networks = Networks.read(path)
    cases, bars = [], []
    for limit in LIMITS:
        for trials in TRIALS:
            case = compare(networks, limit, trials, repetitions, seed)
            cases.append(case)
            columns = ("way", "mean %", "sd", "regret", "P > random", "P > rejecting", "s a search")
            keys = ("mean", "standard_deviation", "regret", "above_random", "above_rejecting_random", "seconds")
            what = f"{limit / 1e6:g} MFLOPs, {trials} trials"
            table(what, columns, [(name, *(each[key] for key in keys)) for name, each in case["ways"].items()])
            rule = case["ways"]["the rule"]
            bars.append(bar(f"{what}: P > random", rule["above_random"], AGAINST_PLAIN, at_least=True))
            above = rule["above_rejecting_random"]
            bars.append(bar(f"{what}: P > rejecting random", above, AGAINST_REJECTING, at_least=True))
    keep("search_table", seed, quick, began, {"repetitions": repetitions, "cases": cases, "bars": bars})
    return sum(not each["held"] for each in bars)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["table", "real"], default="table")
    parser.add_argument("--trials", type=int, default=24, help="of part real")
    parser.add_argument("--epochs", type=int, default=18, help="of part real")
    parser.add_argument("--seeds", type=int, default=3, help="of part real")
    parser.add_argument("--table", type=Path, default=os.environ.get(VARIABLE), help=f"or ${VARIABLE}")
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.part == "real":
        from search_digits import on_digits

        trials, epochs, seeds = (4, 3, 1) if options.quick else (options.trials, options.epochs, options.seeds)
        return int(on_digits(seeds, trials, epochs, options.quick) > 0)
    if options.table is None or not Path(options.table).is_file():
        console.print(f"skipped: give --table or ${VARIABLE}, the JSON of github.com/xiusu/NAS-Bench-Macro")
        return 0
    repetitions = 5 if options.quick else options.repetitions
    return int(on_table(Path(options.table), repetitions, options.seed, options.quick) > 0)


if __name__ == "__main__":
    sys.exit(main())
