"""Prior scores of a space from the model itself: its quality with one stage replaced and not trained.

Weights of a replacement are fitted to what the stage gave (`omgoptim/techniques/distill`), so a score says how much of
the stage the option keeps. The sum over a configuration's options is a feature of the surrogate. Source: the block-wise
scores of LANA (Molchanov et al. 2021, arXiv:2107.10624); differs in a closed-form fit, no training.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omgoptim.architecture_search.journal import cut_torn_line
from omgoptim.architecture_search.propose import Load
from omgoptim.architecture_search.space import Indices, Space
from omgoptim.errors import OmgoptimError
from omgoptim.operations.architecture_search.spaces import Searched
from omgoptim.operations.compression_job import Job
from omgoptim.requests import SearchRequest

LEAST_MINUTES = 60.0
"""Budget from which the scores are worth their time. Chosen: every option is scored once, which a short budget needs
for trials."""

WORST = 1.0
"""Loss of an option that cannot be scored, or gives no usable numbers."""


def quality_hints(job: Job[SearchRequest], searched: Searched, folder: Path) -> Load | None:
    """Score each option alone on the selection samples; None for a user's space, or where the budget is short.

    Scores of an interrupted search are read.
    """
    minutes, space = job.request.budget_minutes, searched.product
    if space is None or searched.parameters is not None or minutes is None or minutes < LEAST_MINUTES:
        return None
    file = folder / "prior.jsonl"
    cut_torn_line(file)
    losses = [float(line) for line in file.read_text().splitlines()] if file.exists() else []
    singles = space.singles[1:]
    for number, row in enumerate(singles[len(losses) :], start=len(losses)):
        job.context.progress(f"scoring replacements untrained: {number} of {len(singles)}", 0.24)
        try:
            score = job.datasets.evaluator.score(searched.build(space.configuration(row)))
            loss = min(WORST, job.drop(score))
        except OmgoptimError:  # options that do not build are found by the search
            loss = WORST
        losses.append(loss)
        with open(file, "a", encoding="utf-8") as target:
            target.write(json.dumps(loss) + "\n")
    return hint_of(space, losses)


def hint_of(space: Space, losses: list[float]) -> Load:
    """Return the function that sums the losses of a configuration's options, negated: higher is better.

    Args:
        space: of the configurations.
        losses: of each option but a knob's first, in the order of `Space.singles`.
    """

    def hint(rows: Indices) -> NDArray[np.float64]:
        total: NDArray[np.float64] = -(space.one_hot(rows) @ np.array(losses))
        return total

    return hint
