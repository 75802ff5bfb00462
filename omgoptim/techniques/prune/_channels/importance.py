"""Channel importance: one score for each of the root's channels; the highest are kept.

Every layer of a group contributes: a channel's row of the weight that writes it, its column of each weight that reads
it, its scale in a normalization. The scores are averaged over the layers and divided by the group's mean, so that
groups can be ranked together. Sources: magnitude DepGraph (arXiv:2301.12900), taylor arXiv:1906.10771, bn_scale Network
Slimming (arXiv:1708.06519), lamp arXiv:2010.07611, fpgm arXiv:1811.00250, hessian Optimal Brain Damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.errors import DataError, TechniqueError
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.requests.prune import Structured
from omgoptim.techniques.probe import quiet_output
from omgoptim.techniques.prune._channels.groups import Group, Groups, Place, as_rows
from omgoptim.techniques.prune._unstructured.saliency import lamp_of_squares
from omgoptim.techniques.registry import ModuleRun

HESSIAN_SAMPLES = 128
"""Maximum samples whose gradients are squared. Chosen: each costs a backward pass."""

Score = Callable[[nn.Module, Place], Tensor | None]
"""Scores of one place: (width of that side,), or None where the criterion does not apply."""


def importance_of(module: nn.Module, groups: Groups, params: Structured, run: ModuleRun) -> dict[str, Tensor]:
    """Return the importance (width,) of each group's root channels by name, float32 on the CPU.

    Channels of a unit have the mean over the unit; the mean over the group is 1.

    Raises:
        DataError: taylor or hessian without a single batch, or with a loss whose gradient is not a number.
    """
    if params.importance == "random":
        generator = torch.Generator().manual_seed(run.seed)
        drawn = {group.name: torch.rand(group.width, generator=generator) for group in groups.groups}
        return {group.name: _by_unit(drawn[group.name], group) for group in groups.groups}
    score = _score(module, groups.groups, params, run)
    scores = {}
    for group in groups.groups:
        raw = _over_places(module, group, score)
        if raw is None:  # such as bn_scale in a group without normalization
            raw = _over_places(module, group, _magnitude)
        assert raw is not None
        raw = lamp_of_squares(raw) if params.importance == "lamp" else raw
        scores[group.name] = _by_unit(raw / raw.mean().clamp_min(1e-12), group)
    return scores


def _by_unit(values: Tensor, group: Group) -> Tensor:
    units = group.units()
    spread = torch.empty_like(values)
    spread[units] = values[units].mean(1, keepdim=True).expand(-1, group.unit).clone()
    return spread


def _over_places(module: nn.Module, group: Group, score: Score) -> Tensor | None:
    """Return the mean over the places of each root channel's score; several positions of a channel add up."""
    total, count = torch.zeros(group.width), 0
    for place in group.places:
        scores = score(module, place)
        if scores is not None:
            total.index_add_(0, place.roots, scores.cpu().float()[place.positions])
            count += 1
    return total / count if count else None


def _score(module: nn.Module, groups: Iterable[Group], params: Structured, run: ModuleRun) -> Score:
    if params.importance == "bn_scale":
        return _norm_scale
    if params.importance == "fpgm":
        return _distance
    if params.importance in ("taylor", "hessian"):
        return _of_gradients(module, list(groups), params.importance, run)
    return _magnitude


def _magnitude(module: nn.Module, place: Place) -> Tensor | None:
    """Return the sum of squares of each channel's weights."""
    return _sum_over_weights(module, place, lambda values: values.square(), norms=True)


def _norm_scale(module: nn.Module, place: Place) -> Tensor | None:
    """Return |scale| of each channel in a normalization."""
    layer = _layer(module, place)
    is_norm = isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    return layer.weight.detach().abs() if is_norm and layer.weight is not None else None


def _distance(module: nn.Module, place: Place) -> Tensor | None:
    """Return the sum of the distances of a channel's squared weights to all others': redundant channels go first."""
    layer = _layer(module, place)
    if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
        return None
    rows = as_rows(layer, place.side, layer.weight.detach()).square().float()
    return torch.cdist(rows, rows).sum(1)


def _layer(module: nn.Module, place: Place) -> Any:
    return module.get_submodule(place.path) if place.axis is None else None


def _sum_over_weights(
    module: nn.Module, place: Place, function: Callable[[Tensor], Tensor], *, norms: bool
) -> Tensor | None:
    """Return the sum over each channel's weights of a function of the weight tensor."""
    layer = _layer(module, place)
    if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
        return as_rows(layer, place.side, function(layer.weight.detach())).sum(1)
    if norms and isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and layer.weight is not None:
        return function(layer.weight.detach())
    return None


# From gradients


def _of_gradients(module: nn.Module, groups: list[Group], kind: str, run: ModuleRun) -> Score:
    """Return taylor: |sum of weight x gradient| of each channel, mean over batches; or hessian: weight² x gradient²."""
    if not run.statistics.batches:
        raise DataError(f"importance {kind} needs data", "it uses gradients, and there is no batch")
    places = {(place.path, place.side): place for group in groups for place in group.places}
    sums: dict[tuple[str, str], Tensor] = {}
    for args, kwargs, target in _single_samples(run.calls()) if kind == "hessian" else run.calls():
        gradients = _gradients(module, args, kwargs, target, run)
        for key, place in places.items():
            scores = _sum_over_weights(
                module, place, partial(_product, gradients.get(f"{place.path}.weight"), kind), norms=True
            )
            if scores is not None:
                scores = scores if kind == "hessian" else scores.abs()
                sums[key] = sums[key] + scores if key in sums else scores
        run.progress(f"importance {kind}", None)
    if not all(bool(torch.isfinite(total).all()) for total in sums.values()):
        raise DataError(f"importance {kind} cannot be computed", "a gradient of the loss is infinite or NaN")
    return lambda _module, place: sums.get((place.path, place.side))


def _product(gradient: Tensor | None, kind: str, weight: Tensor) -> Tensor:
    product = weight * (0.0 if gradient is None else gradient)
    return product.square() if kind == "hessian" else product


def _single_samples(batches: Iterable[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield single samples: the square of a mean gradient is not the mean of squares."""
    taken = 0
    for args, kwargs, target in batches:
        for row in range(len(next(iter([*args, *kwargs.values()])))):
            if taken == HESSIAN_SAMPLES:
                return
            taken += 1
            row_slice = slice(row, row + 1)
            try:
                yield (
                    [arg[row_slice] for arg in args],
                    {k: v[row_slice] for k, v in kwargs.items()},
                    _target_rows(target, row_slice),
                )
            except (TypeError, KeyError) as error:
                raise DataError("importance hessian needs targets that can be split by sample", str(error)) from error


def _target_rows(target: Any, row_slice: slice) -> Any:
    if isinstance(target, dict):
        return {key: value[row_slice] for key, value in target.items()}
    return None if target is None else target[row_slice]


def _gradients(module: nn.Module, args: Any, kwargs: Any, target: Any, run: ModuleRun) -> dict[str, Tensor]:
    """Return the gradient of the loss for every trained parameter, in eval mode; `.grad` is not changed."""
    names = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    with evaluation_mode(module), torch.enable_grad(), quiet_output():
        loss = run.loss(module(*args, **kwargs), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TechniqueError(
                "the loss has no gradient", "importance taylor and hessian use it", "use importance magnitude"
            )
        found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(names.items(), found, strict=True)
    }
