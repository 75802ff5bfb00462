"""Sparsity schedule over rounds.

Amounts are fractions of the original, so the last one is the target, and each round prunes up to its level: levels 0.5,
0.75, 0.9 end at 0.9, while pruning 0.9 of what two rounds left would end at 0.9875.
"""

from __future__ import annotations

from omgoptim.errors import RequestError, did_you_mean

POWERS = {"linear": 1, "cubic": 3}


def levels(shape: str, goal: float, rounds: int, start: float = 0.0) -> list[float]:
    """Return the amount that each round reaches, rising; the last is exactly `goal`.

    Args:
        shape: one_shot: one round, however many are asked for, because a second would have nothing left to do. linear,
            cubic: s_t = goal + (start - goal) (1 - t / rounds)^p with p = 1 or 3, for t = 1..rounds; cubic takes most
            in the first rounds (arXiv:1710.01878, equation 1).
        goal: the amount at the end, in (start, 1].
        rounds: how many, at least 1.
        start: the amount that is gone already, in [0, 1).

    Raises:
        RequestError: an unknown shape, no round, or a goal that does not lie above the start.
    """
    if rounds < 1:
        raise RequestError(f"a schedule of {rounds} rounds", "it needs at least one")
    if not 0 <= start < goal <= 1:
        raise RequestError(
            f"the schedule cannot go from {start:g} to {goal:g}",
            "amounts rise, from 0 to 1 at most",
            f"ask for more than the {start:g} that is gone already" if 0 < start < 1 else "",
        )
    if shape == "one_shot":
        return [goal]
    if shape not in POWERS:
        raise RequestError(f"'{shape}' is not a schedule", did_you_mean(shape, ["one_shot", *POWERS]))
    span, power = goal - start, POWERS[shape]
    return [*(goal - span * (1 - t / rounds) ** power for t in range(1, rounds)), goal]
