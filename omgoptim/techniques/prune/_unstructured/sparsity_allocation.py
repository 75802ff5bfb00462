"""Sparsity allocation over layers and rounds: Erdos-Renyi shares, integer counts, small dense layers, a schedule.

Numbers in, numbers out. Amounts are fractions of the original, so the last round's is the target: levels 0.5, 0.75, 0.9
end at 0.9, while pruning 0.9 of what two rounds left would end at 0.9875.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from omgoptim.errors import RequestError, did_you_mean

SMALL_RATIO = 0.02
"""Maximum weights of a small layer over the largest layer's. Chosen, as the two below: more sparsity elsewhere."""
SMALL_SHARE = 0.01
"""Maximum share of all weights that the small layers, which are left dense, hold together."""
SMALL_SHARE_OF_KEPT = 0.1
"""Maximum share of the kept weights that they hold: the other layers lose as many more."""

POWERS = {"linear": 1, "cubic": 3}


def erdos_renyi(shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[float]:
    """Return the sparsity of each layer by the Erdos-Renyi-kernel rule.

    Density is in proportion to (n_out + n_in + k_1 + ...) / (n_out n_in k_1 ...), as in RigL (arXiv:1911.11134); a
    layer that would keep more than all of its weights keeps all, and the others share the rest.

    Args:
        shapes: of the weights: (out, in), or (out, in / groups, kernel...).
        sparsity: fraction of zeros over all layers together, in [0, 1].
    """
    counts = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / count for shape, count in zip(shapes, counts, strict=True)]
    dense: set[int] = set()
    kept = (1 - sparsity) * sum(counts)
    while len(dense) < len(shapes):
        others = [index for index in range(len(shapes)) if index not in dense]
        remaining = kept - sum(counts[index] for index in dense)
        scale = remaining / sum(raw[index] * counts[index] for index in others)
        full = {index for index in others if scale * raw[index] >= 1}
        if not full:
            return [0.0 if index in dense else 1 - scale * raw[index] for index in range(len(shapes))]
        dense |= full
    return [0.0] * len(shapes)


def largest_remainder(shares: Sequence[float], total: int, lower: Sequence[int], upper: Sequence[int]) -> list[int]:
    """Return whole numbers near `shares` that add up to `total`, by largest remainder; of equals the first comes first.

    Args:
        shares: how many from each, a real number; where the bounds forbid it, the others share the difference in
            proportion to the room that they have.
        total: their sum; taken as near as the bounds allow.
        lower: lower bounds.
        upper: upper bounds, none below its lower bound.
    """
    total = min(max(total, sum(lower)), sum(upper))
    exact = [min(max(want, low), high) for want, low, high in zip(shares, lower, upper, strict=True)]
    gap = total - math.fsum(exact)
    room = [high - now if gap > 0 else now - low for now, low, high in zip(exact, lower, upper, strict=True)]
    if math.fsum(room) > 0:
        share = gap / math.fsum(room)
        exact = [now + share * free for now, free in zip(exact, room, strict=True)]
    counts = [min(max(math.floor(now), low), high) for now, low, high in zip(exact, lower, upper, strict=True)]
    missing = total - sum(counts)
    free = [index for index, high in enumerate(upper) if counts[index] < high]
    free.sort(key=lambda index: round(counts[index] - exact[index], 9))
    for index in free[: max(missing, 0)]:
        counts[index] += 1
    return counts


def small_layers(counts: Sequence[int], sparsity: float) -> set[int]:
    """Return the positions of layers that are so small that they stay dense.

    A first layer of one channel and a classifier of ten classes hold almost none of a network's weights, and every
    output passes through each of those. The smallest come first.
    """
    limit = min(SMALL_SHARE, SMALL_SHARE_OF_KEPT * (1 - sparsity)) * sum(counts)
    chosen: set[int] = set()
    for index in sorted(range(len(counts)), key=lambda index: counts[index]):
        limit -= counts[index]
        if limit < 0 or counts[index] >= SMALL_RATIO * max(counts):
            break
        chosen.add(index)
    return chosen


def round_targets(shape: str, goal: float, rounds: int, start: float = 0.0) -> list[float]:
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
        raise RequestError(f"the pruning schedule has {rounds} rounds", "it needs at least one")
    if not 0 <= start < goal <= 1:
        raise RequestError(
            f"the pruning schedule cannot go from {start:g} to {goal:g}",
            "the pruned fraction must increase and lie between 0 and 1",
            f"give more than {start:g}, which is pruned already" if 0 < start < 1 else "",
        )
    if shape == "one_shot":
        return [goal]
    if shape not in POWERS:
        raise RequestError(f"'{shape}' is not a schedule", did_you_mean(shape, ["one_shot", *POWERS]))
    span, power = goal - start, POWERS[shape]
    return [*(goal - span * (1 - t / rounds) ** power for t in range(1, rounds)), goal]
