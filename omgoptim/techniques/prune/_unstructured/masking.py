"""Masking: zero the weights of lowest saliency and report the changes.

The sparsity is that of all selected weights together, exactly: `round(sparsity * weights)` of them are zero at the end,
however they are distributed over layers. Existing zeros have the lowest rank: they count and stay, so that masks of
rising sparsity are nested. Of equal scores the first becomes zero first. Only values change: no masks, no buffers, no
renamed parameters; a zero is +0.0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omgoptim.errors import TechniqueError
from omgoptim.reports import Change, Skip
from omgoptim.techniques.prune._unstructured.parameter_selection import Selection, Weight, from_rows, to_rows
from omgoptim.techniques.prune._unstructured.sparsity_allocation import erdos_renyi, largest_remainder, small_layers
from omgoptim.techniques.registry import Outcome

Scope = Literal["global", "per_layer", "per_row", "erdos_renyi"]
"""Scope of the ranking: all layers together, each layer, each row of a layer, or shares by the layers' shapes."""

SMALL_REASON = "left dense: it has only {share:.2f} % of the selected weights; other layers are pruned more instead"
ABOVE_THRESHOLD_REASON = "the saliency of all its weights is above the pruning threshold"


@dataclass(frozen=True, slots=True)
class SparsityTarget:
    """Target sparsity, and its allocation over layers."""

    sparsity: float
    """Fraction of the selected weights that are zero at the end."""
    scope: Scope
    score_name: str
    """Name of the score, for the report."""
    spare_small: bool
    """True to leave tiny layers dense."""


def zero_lowest(selection: Selection, scores: Mapping[str, Tensor], target: SparsityTarget) -> Outcome:
    """Zero the weights with the lowest scores, in place.

    Args:
        selection: the weights, and what was skipped before.
        scores: by the weights' paths, each of its weight's shape; larger matters more.
        target: target sparsity, and its allocation over layers.

    Raises:
        TechniqueError: no weight became zero.
    """
    weights = selection.weights
    dense = small_layers([weight.count for weight in weights], target.sparsity) if target.spare_small else set()
    free = [weight for index, weight in enumerate(weights) if index not in dense]
    zeros_in_dense = sum(_zeros(weight) for index, weight in enumerate(weights) if index in dense)
    total = round(target.sparsity * selection.count)
    before = [_zeros(weight) for weight in weights]
    for weight, mask in zip(free, _masks(free, scores, total - zeros_in_dense, target.scope), strict=True):
        zero_where(weight, mask)
    if selection.zeros <= sum(before):
        raise nothing_zeroed(selection, target.sparsity)
    return outcome_of(selection, before, target.score_name, {weights[index].path for index in dense})


def zero_where(weight: Weight, mask: Tensor) -> None:
    """Zero a weight where the mask (of its shape) is True; existing zeros, -0.0 too, become +0.0."""
    with torch.no_grad():
        weight.parameter.masked_fill_(mask | (weight.parameter == 0), 0.0)


def outcome_of(selection: Selection, before: list[int], score_name: str, dense: set[str]) -> Outcome:
    """Return the outcome of masking.

    Args:
        selection: the weights, as they are now.
        before: zeros of each weight before masking.
        score_name: the score, for the report.
        dense: paths of weights that were left dense on purpose.
    """
    changed, skipped = [], list(selection.skipped)
    for weight, zeros_before in zip(selection.weights, before, strict=True):
        zeros = _zeros(weight)
        if not zeros:
            share = 100 * weight.count / selection.count
            reason = SMALL_REASON.format(share=share) if weight.path in dense else ABOVE_THRESHOLD_REASON
            skipped.append(Skip(path=weight.path, reason=reason, kind="no_benefit"))
            continue
        what_changed = [score_name, *(f"shared with {path}" for path, _ in weight.shared)]
        if weight.count - zeros == 1 and weight.count > 1:
            what_changed.append("one weight kept, so that the layer's output still depends on its input")
        changed.append(
            Change(
                path=weight.path,
                what=", ".join(what_changed),
                before=f"{100 * zeros_before / weight.count:.1f} % zero" if zeros_before else "dense",
                after=f"{100 * zeros / weight.count:.1f} % zero ({zeros:,} of {weight.count:,})",
            )
        )
    zeros, count = selection.zeros, selection.count
    note = f"{100 * zeros / count:.2f} % of the selected weights are zero ({zeros:,} of {count:,})."
    return Outcome(changed, skipped, [note])


def nothing_zeroed(selection: Selection, sparsity: float) -> TechniqueError:
    """Return the error for a technique that would change nothing."""
    zeros, count = selection.zeros, selection.count
    if zeros:
        return TechniqueError(
            "no weight became zero",
            f"{zeros:,} of the {count:,} selected weights are zero already, which meets a sparsity of {sparsity:g}",
            f"use a sparsity above {zeros / count:.4f}",
        )
    return TechniqueError(
        "no weight became zero",
        f"a sparsity of {sparsity:g} is less than one of the {count:,} selected weights, or would empty whole layers",
        "raise the sparsity, or select more layers",
    )


def _masks(weights: list[Weight], scores: Mapping[str, Tensor], total: int, scope: Scope) -> list[Tensor]:
    values = [weight.parameter.detach() for weight in weights]
    ranking_scores = [scores[weight.path].to(value.device) for weight, value in zip(weights, values, strict=True)]
    if scope == "global":
        return globally_lowest(ranking_scores, values, total)
    counts = [weight.count for weight in weights]
    sparsity = min(max(total / sum(counts), 0.0), 1.0)
    if scope == "erdos_renyi":
        fractions = erdos_renyi([tuple(value.shape) for value in values], sparsity)
    else:
        fractions = [sparsity] * len(weights)
    min_zeros = [_zeros(weight) for weight in weights]
    max_zeros = [max(low, _max_zeros(weight, scope)) for weight, low in zip(weights, min_zeros, strict=True)]
    exact = [fraction * count for fraction, count in zip(fractions, counts, strict=True)]
    allocated = largest_remainder(exact, total, min_zeros, max_zeros)
    if scope == "per_row":
        return [
            _by_row(weight, score, count)
            for weight, score, count in zip(weights, ranking_scores, allocated, strict=True)
        ]
    return [
        layer_mask(score, value, count) for score, value, count in zip(ranking_scores, values, allocated, strict=True)
    ]


def _by_row(weight: Weight, scores: Tensor, count: int) -> Tensor:
    values = weight.parameter.detach()
    mask = row_mask(to_rows(scores, weight.layer), to_rows(values, weight.layer), count)
    return from_rows(mask, weight.layer, tuple(values.shape))


def _max_zeros(weight: Weight, scope: Scope) -> int:
    """Return the most zeros that leave one weight to each layer, or to each of its rows."""
    return weight.count - (len(to_rows(weight.parameter.detach(), weight.layer)) if scope == "per_row" else 1)


def _zeros(weight: Weight) -> int:
    return int((weight.parameter.detach() == 0).sum())


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return a mask (N,) of the `count` smallest of scores (N,), without NaN."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count).values
    mask = scores < limit
    equals = (scores == limit).nonzero().flatten()
    mask[equals[: count - int(mask.sum())]] = True
    return mask


def ranking_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the scores (N,) of one layer for ranking: its zeros first, its best weight after those of any layer.

    A layer without any weight passes nothing on; so the best of each is removed last.
    """
    zeros = weights == 0
    order = scores.masked_fill(zeros, -torch.inf)
    if not bool(zeros.all()):
        order[order.argmax()] = torch.inf
    return order


def globally_lowest(scores: Sequence[Tensor], weights: Sequence[Tensor], total: int) -> list[Tensor]:
    """Return masks of several layers, ranked together: `total` zeros, but never the last weight of a layer.

    Args:
        scores: one tensor per layer, of any shape.
        weights: of the same shapes.
        total: zeros over all layers.
    """
    order = torch.cat(
        [
            ranking_scores(s.flatten(), w.flatten()).to("cpu", torch.float32)
            for s, w in zip(scores, weights, strict=True)
        ]
    )
    mask = smallest(order, min(total, int((order != torch.inf).sum())))
    parts = torch.split(mask, [weight.numel() for weight in weights])
    return [part.view(weight.shape).to(weight.device) for part, weight in zip(parts, weights, strict=True)]


def layer_mask(scores: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return the mask of one layer, of any shape: `count` zeros."""
    return smallest(ranking_scores(scores.flatten(), weights.flatten()), count).view(weights.shape)


def row_mask(scores_OI: Tensor, weights_OI: Tensor, count: int) -> Tensor:
    """Return the mask (O, I) of one layer with equally many zeros in each row, up to rounding.

    The first rows get one more where `count` does not divide; a row keeps its best weight.
    """
    outputs, inputs = weights_OI.shape
    zeros = (weights_OI == 0).sum(1)
    min_zeros = zeros.tolist()
    max_zeros = [max(inputs - 1, already) for already in min_zeros]
    counts = torch.tensor(
        largest_remainder([count / outputs] * outputs, count, min_zeros, max_zeros), device=scores_OI.device
    )
    order = scores_OI.masked_fill(weights_OI == 0, -torch.inf).argsort(dim=1, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(inputs, device=order.device).expand_as(order).contiguous())
    return ranks < counts[:, None]


def n_of_m_mask(scores_OI: Tensor, weights_OI: Tensor, n: int, m: int) -> Tensor:
    """Return the mask (O, I) that leaves the n best of every m neighbours of a row; m divides I."""
    grouped = scores_OI.masked_fill(weights_OI == 0, -torch.inf).reshape(-1, m)
    order = grouped.argsort(dim=1, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask.scatter_(1, order[:, : m - n], True)
    return mask.reshape(scores_OI.shape)
