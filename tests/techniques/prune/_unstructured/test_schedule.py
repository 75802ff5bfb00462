"""Schedules: how the amount grows, and that it ends where it was to end."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from omgoptim.errors import RequestError
from omgoptim.techniques.prune._unstructured.sparsity_allocation import levels


def test_a_linear_schedule_takes_the_same_each_round() -> None:
    assert levels("linear", 0.9, 3) == pytest.approx([0.3, 0.6, 0.9])


def test_a_cubic_schedule_follows_zhu_and_gupta() -> None:
    assert levels("cubic", 0.8, 4) == pytest.approx([0.8 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)])
    assert levels("cubic", 0.9, 2, start=0.5) == pytest.approx([0.85, 0.9])


def test_a_cubic_schedule_takes_less_each_round() -> None:
    amounts = [0.0, *levels("cubic", 0.9, 6)]
    steps = [after - before for before, after in itertools.pairwise(amounts)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] > 0


def test_one_shot_is_one_round_however_many_are_asked_for() -> None:
    assert levels("one_shot", 0.9, 5) == [0.9]


@pytest.mark.parametrize("shape", ["one_shot", "linear", "cubic"])
@pytest.mark.parametrize("goal", [0.1, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_the_last_amount_is_the_goal_to_the_last_bit(shape: str, goal: float, rounds: int) -> None:
    amounts = levels(shape, goal, rounds)
    assert amounts[-1] == goal
    assert amounts == sorted(set(amounts))
    assert all(0 < amount <= 1 for amount in amounts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("spiral", 0.9, 3), "is not a schedule"),
        (("linear", 0.9, 0), "0 rounds"),
        (("linear", 0.5, 3, 0.5), "cannot go from 0.5 to 0.5"),
        (("cubic", 0.5, 3, 0.9), "cannot go from 0.9 to 0.5"),
        (("linear", 0.0, 3), "cannot go from 0 to 0"),
        (("linear", 1.5, 3), "cannot go"),
        (("linear", float("nan"), 3), "cannot go"),
    ],
)
def test_an_impossible_schedule_is_refused(arguments: tuple[str, float, int], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        levels(*arguments)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; import omgoptim.techniques.prune._unstructured.sparsity_allocation; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
