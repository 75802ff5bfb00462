"""Saliency of single weights: LAMP and Wanda scores, and the norms of inputs that Wanda reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import attached
from omgoptim.techniques.prune._unstructured.parameter_selection import Weight, is_linear_transposed
from omgoptim.techniques.registry import ModuleRun

Squares = Callable[[tuple[Any, ...], dict[str, Any]], "Tensor | None"]
"""Function from a layer's arguments to sums of squares of its inputs, which broadcast to its weight's rows."""


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
    not_smaller = rising.flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = torch.where(not_smaller > 0, rising / not_smaller, 0.0)
    return scores


def wanda(rows: Tensor, norms: Tensor) -> Tensor:
    """Return the Wanda scores (arXiv:2306.11695): magnitude times the norm of the input that the weight multiplies.

    Args:
        rows: weights (O, I).
        norms: of each input (I,), or of each output's inputs (O, I) where groups read different ones.
    """
    return rows.detach().abs().float() * norms.to(rows.device).float()


def input_norms(module: nn.Module, weights: Iterable[Weight], run: ModuleRun) -> dict[str, Tensor]:
    """Return the input norms by the weights' paths, of shape (I,) or (O, I) in the order of `to_rows`.

    The root of the sum over all samples and positions of the squared input. Weights without visible inputs are left
    out: those of recurrent layers, whose states are internal, and of layers whose weight is used without calling them.
    """
    sums: dict[str, Tensor] = {}

    def record(path: str, squares: Squares) -> Callable[..., None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = squares(args, kwargs) if _first_argument(args, kwargs).numel() else None  # no rows: it has not run
            if seen is not None:
                sums[path] = sums[path] + seen if path in sums else seen

        return hook

    readers = [
        (layer, record(weight.path, squares))
        for weight in weights
        for layer, path in zip(weight.layers, weight.paths, strict=True)
        if (squares := _squares_of(layer, path)) is not None
    ]
    hooks = (layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in readers)
    with attached(hooks), evaluation_mode(module):
        for args, kwargs, _ in run.calls():
            module(*args, **kwargs)
    return {path: total.sqrt() for path, total in sums.items()}


def _squares_of(layer: nn.Module, path: str) -> Squares | None:
    """Return how the squares of a layer's inputs are summed; None where they are not visible."""
    if isinstance(layer, nn.MultiheadAttention):
        return _projection_squares(path.rpartition(".")[2])
    if isinstance(layer, _ConvTransposeNd):
        return lambda args, kwargs: _squares_per_channel(layer, _first_argument(args, kwargs))
    if isinstance(layer, _ConvNd):
        return lambda args, kwargs: _squares_per_tap(layer, _first_argument(args, kwargs))
    if isinstance(layer, nn.Linear) or is_linear_transposed(layer):
        return lambda args, kwargs: _squares_per_feature(_first_argument(args, kwargs))
    return None


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _squares_per_feature(x: Tensor) -> Tensor:
    return x.detach().float().reshape(-1, x.shape[-1]).square().sum(0)


def _projection_squares(name: str) -> Squares:
    """Sum for nn.MultiheadAttention: the rows of the packed weight read the query, the key and the value."""

    def squares(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        arguments = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        parts = [_squares_per_feature(arguments[part]) for part in ("query", "key", "value")]
        single = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}
        if name in single:
            return parts[single[name]]
        return torch.cat([part.expand(len(part), -1) for part in parts])  # (3E, E)

    return squares


def _squares_per_tap(layer: _ConvNd, x: Tensor) -> Tensor:
    """Return sums of squares (O, *k * I/g): for each output channel the inputs that its group reads."""
    spatial = len(layer.kernel_size)
    x = x.detach().float()
    x = x.unsqueeze(0) if x.ndim == spatial + 1 else x
    padding = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    energy = functional.pad(x, padding, mode=mode).square().sum(0)  # (I, *padded)
    sums = []
    for at in itertools.product(*(range(size) for size in layer.kernel_size)):
        window = [slice(None)]
        for axis, offset in enumerate(at):
            stride, dilation, kernel = layer.stride[axis], layer.dilation[axis], layer.kernel_size[axis]
            last = energy.shape[axis + 1] - dilation * (kernel - 1)  # first places of the kernel lie before it
            window.append(slice(offset * dilation, offset * dilation + last, stride))
        sums.append(energy[tuple(window)].flatten(1).sum(1))
    return _for_each_output(torch.stack(sums), layer)


def _squares_per_channel(layer: _ConvNd, x: Tensor) -> Tensor:
    """Return sums of squares (O, *k * I/g): every position of the kernel reads every place of its input channels.

    Places whose product padding cuts off are counted too.
    """
    x = x.detach().float()
    x = x.unsqueeze(0) if x.ndim == len(layer.kernel_size) + 1 else x
    energy = x.square().transpose(0, 1).flatten(1).sum(1)  # (I,)
    return _for_each_output(energy.expand(math.prod(layer.kernel_size), -1), layer)


def _for_each_output(sums_KI: Tensor, layer: _ConvNd) -> Tensor:
    """Expand (K, I) to (O, K * I/g): each output's own group of channels, at each position of the kernel."""
    grouped = sums_KI.reshape(len(sums_KI), layer.groups, -1).transpose(0, 1).flatten(1)  # (g, K * I/g)
    return grouped.repeat_interleave(layer.out_channels // layer.groups, dim=0)
