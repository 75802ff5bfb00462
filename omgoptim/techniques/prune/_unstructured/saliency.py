"""Saliency of single weights: LAMP and Wanda scores of the shape of the weight."""

from __future__ import annotations

import torch
from torch import Tensor


def lamp(weight: Tensor) -> Tensor:
    """Return the LAMP scores of a weight (arXiv:2010.07611, equation 3), of its shape.

    They are comparable between layers, so that ranking all layers together allocates the sparsity among them:

        score(u) = w_u^2 / sum of w_v^2 over all v whose magnitude is not below that of u

    Of weights of equal magnitude the first counts as the smallest. The largest of a layer scores 1, a zero 0.
    """
    return lamp_of_squares(weight.detach().double().square().flatten()).reshape(weight.shape).float()


def lamp_of_squares(squares: Tensor) -> Tensor:
    """Return each square (N,) divided by the sum of all that are not smaller; 0 for a zero."""
    order = squares.argsort(stable=True)
    rising = squares[order]
    left = rising.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = torch.where(left > 0, rising / left, 0.0)
    return scores


def by_input(rows: Tensor, norms: Tensor) -> Tensor:
    """Wanda (arXiv:2306.11695): magnitude times the norm of the input that the weight multiplies.

    Args:
        rows: weights (O, I).
        norms: of each input (I,), or of each output's inputs (O, I) where groups read different ones.
    """
    return rows.detach().abs().float() * norms.to(rows.device).float()
