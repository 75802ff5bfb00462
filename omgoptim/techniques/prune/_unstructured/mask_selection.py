"""Masks of the lowest saliency. Pure functions of tensors; each mask has exactly the requested count.

A weight that is zero already has the lowest rank: it counts and stays, so that masks of rising sparsity are nested.
Ties are broken by position: of equals, the first becomes zero first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omgoptim.techniques.prune._unstructured.sparsity_allocation import allot


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return a mask (N,) of the `count` smallest of scores (N,), without NaN."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count).values
    mask = scores < limit
    equals = (scores == limit).nonzero().flatten()
    mask[equals[: count - int(mask.sum())]] = True
    return mask


def ranked(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the scores (N,) of one layer for ranking: its zeros first, its best weight after those of any layer.

    A layer without any weight passes nothing on; so the best of each is removed last.
    """
    gone = weights == 0
    order = scores.masked_fill(gone, -torch.inf)
    if not bool(gone.all()):
        order[order.argmax()] = torch.inf
    return order


def together(scores: Sequence[Tensor], weights: Sequence[Tensor], total: int) -> list[Tensor]:
    """Return masks of several layers, ranked together: `total` zeros, but never the last weight of a layer.

    Args:
        scores: one tensor per layer, of any shape.
        weights: of the same shapes.
        total: zeros over all layers.
    """
    order = torch.cat(
        [ranked(s.flatten(), w.flatten()).to("cpu", torch.float32) for s, w in zip(scores, weights, strict=True)]
    )
    mask = smallest(order, min(total, int((order != torch.inf).sum())))
    parts = torch.split(mask, [weight.numel() for weight in weights])
    return [part.view(weight.shape).to(weight.device) for part, weight in zip(parts, weights, strict=True)]


def alone(scores: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return the mask of one layer, of any shape: `count` zeros."""
    return smallest(ranked(scores.flatten(), weights.flatten()), count).view(weights.shape)


def by_row(scores_OI: Tensor, weights_OI: Tensor, count: int) -> Tensor:
    """Return the mask (O, I) of one layer with equally many zeros in each row, up to rounding.

    The first rows get one more where `count` does not divide; a row keeps its best weight.
    """
    outputs, inputs = weights_OI.shape
    zeros = (weights_OI == 0).sum(1)
    least = zeros.tolist()
    most = [max(inputs - 1, already) for already in least]
    counts = torch.tensor(allot([count / outputs] * outputs, count, least, most), device=scores_OI.device)
    order = scores_OI.masked_fill(weights_OI == 0, -torch.inf).argsort(dim=1, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(inputs, device=order.device).expand_as(order).contiguous())
    return ranks < counts[:, None]


def keep_of_every(scores_OI: Tensor, weights_OI: Tensor, n: int, m: int) -> Tensor:
    """Return the mask (O, I) that leaves the n best of every m neighbours of a row; m divides I."""
    grouped = scores_OI.masked_fill(weights_OI == 0, -torch.inf).reshape(-1, m)
    order = grouped.argsort(dim=1, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask.scatter_(1, order[:, : m - n], True)
    return mask.reshape(scores_OI.shape)
