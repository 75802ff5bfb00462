"""The rule beats the control on a small table of trained networks, made by `benchmarks/search_digits_table.py`.

36 networks, three seeds each; multiply-accumulates stand in for latency, a trial sees one seed, and a search is judged
by the mean of the three. Seeds are fixed, so that the result is the same every time.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omgoptim.architecture_search.propose import Observations, Proposer, propose, propose_random
from omgoptim.architecture_search.space import Indices, Knob, Space

TABLE = json.loads(Path(__file__).with_name("digits_table.json").read_text())
SPACE = Space(tuple(Knob(name, tuple(options)) for name, options in TABLE["knobs"].items()))
MACS = {tuple(SPACE.row(each["configuration"])): each["macs"] for each in TABLE["networks"]}
ACCURACIES = {tuple(SPACE.row(each["configuration"])): each["accuracies"] for each in TABLE["networks"]}
SEARCHES = 60


def load(limit: float):
    return lambda rows: np.array([MACS[tuple(row)] for row in rows]) / limit


def ends_with(way: Proposer, limit: float, trials: int, seed: int) -> float:
    luck = np.random.default_rng([seed, 1])
    seen = Observations.none(SPACE)
    for number in range(trials):
        row: Indices | None = way(SPACE, load(limit), seen, seed, number)
        if row is None:
            break
        quality = ACCURACIES[tuple(row)][luck.integers(3)]
        seen = Observations(np.vstack([seen.rows, row]), np.append(seen.qualities, quality), seen.excluded)
    return float(np.mean(ACCURACIES[tuple(seen.rows[np.argmax(seen.qualities)])]))


def test_the_table_holds_every_network_of_the_space() -> None:
    assert len(ACCURACIES) == SPACE.size == 36
    assert all(len(found) == 3 for found in ACCURACIES.values())


@pytest.mark.parametrize(("share", "trials"), [(0.5, 6), (0.75, 6), (0.75, 10)])
def test_the_rule_beats_random_search_with_the_same_rejection(share: float, trials: int) -> None:
    limit = float(np.quantile(list(MACS.values()), share))
    ours = np.array([ends_with(propose, limit, trials, seed) for seed in range(SEARCHES)])
    control = np.array([ends_with(propose_random, limit, trials, seed) for seed in range(SEARCHES)])
    standard_error = np.sqrt((ours.var() + control.var()) / SEARCHES)
    assert ours.mean() - control.mean() > 2 * standard_error
