"""Weights that stayed, fitted anew so that each layer gives what it gave before: on inputs, without labels.

What it does: layer after layer, in the order in which they run, takes what the layer reads in the sparse model, U
(rows, I; a convolution's patches unfolded), and the difference R (rows, O) of what it gave before and gives now, and
adds to each output's kept weights D the ridge regression of R: min |U D' - R|^2 + l |D|^2, D zero where the weight is,
l being RIDGE of the mean of U'U's diagonal. The bias takes part. So the inputs that stay stand in for those that are
gone, and for all that changed further up; the zeros stay zeros.
Source: the reconstruction of layer-wise pruning (OBC arXiv:2208.11580, SparseGPT arXiv:2301.00774) with a mask that is
given; here all rows at once by conjugate gradients, which needs no inverse per row, and the inputs are those of the
sparse model, so that errors do not add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.measure.own_cost import evaluating
from omgoptim.requests.prune import SemiStructured, Unstructured
from omgoptim.techniques.reconstruction.patches import padded, patches_of
from omgoptim.techniques.registry import ModuleRun, Outcome

RIDGE = 1e-2
MOST_INPUTS = 8192
"""A layer that reads more is left as it is: its second moments alone would take half a gigabyte."""

ROWS_PER_INPUT, FEWEST_ROWS = 30, 20_000
"""How many rows are enough: of more, positions are drawn."""

TINY = 1e-30
"""Instead of a zero in a denominator."""

SAMPLES = 16
"""Samples unfolded at once."""

STEPS, TOLERANCE = 30, 1e-4
"""Most steps of the conjugate gradients, and the residual, relative to the right side, at which they end."""


def reconstructed(
    outcome: Outcome, module: nn.Module, before: nn.Module, params: Unstructured | SemiStructured, run: ModuleRun
) -> Outcome:
    """The outcome of zeroing, after the weights that stayed were fitted where there are real inputs to fit them on.

    Args:
        module: after zeroing; changed.
        before: a copy from before it; not changed.
        params: of the technique; `reconstruct` False leaves the weights as they are.
    """
    if not run.real or not params.reconstruct:
        return outcome
    fitted = refit(module, before, [change.path for change in outcome.changed], run)
    if not fitted:
        return outcome
    layers = "1 layer" if len(fitted) == 1 else f"{len(fitted)} layers"
    note = f"The weights that stayed in {layers} were fitted to give what was there before, on inputs without labels."
    return replace(outcome, notes=[*outcome.notes, note])


def refit(module: nn.Module, before: nn.Module, paths: Sequence[str], run: ModuleRun) -> list[str]:
    """Fit the weights that stayed, of linear layers and of convolutions of one and two dimensions.

    Args:
        module: after zeros were put in; its kept weights and biases are changed, and no zero.
        before: the same module before; not changed.
        paths: of the layers that got zeros.

    Returns:
        Paths of the layers that were fitted, in the order in which they run. Left out are those that run more than once
        or not at all, or share their weight.
    """
    order = _in_order(before, [path for path in paths if _can_be_fitted(module, path)], run)
    for index, path in enumerate(order):
        run.progress(f"fitting {path}", index / len(order))
        moments = _moments(module, before, path, run)
        layer: Any = module.get_submodule(path)
        added = solve(moments, layer.weight.detach() != 0, _fits_bias(layer))
        if bool(added.isfinite().all()):
            _add(layer, added)
    return order


@dataclass(slots=True)
class Moments:
    """What a layer's fit is made of, summed over rows; F is I, and one more for the bias where there is one."""

    inputs: Tensor
    """U'U (groups, F, F)."""
    residuals: Tensor
    """R'U (groups, outputs of a group, F)."""


def solve(moments: Moments, kept: Tensor, has_bias: bool) -> Tensor:
    """What to add (groups, outputs of a group, F): zero where `kept`, of the weight's shape, says no."""
    groups, outputs, features = moments.residuals.shape
    mask = kept.reshape(groups, outputs, -1).to(moments.inputs)
    if has_bias:
        mask = torch.cat([mask, mask.new_ones(groups, outputs, 1)], 2)
    diagonal = moments.inputs.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(1)[:, None, None].clamp_min(TINY)
    scale = mask / (diagonal[:, None, :] + ridge)  # the preconditioner; it keeps what is masked at zero
    added = torch.zeros(groups, outputs, features).to(moments.inputs)
    left = moments.residuals * mask
    goal = TOLERANCE * left.norm()
    direction = scale * left
    energy = (left * direction).sum(2, keepdim=True)
    for _ in range(STEPS):
        if left.norm() <= goal:
            break
        moved = (direction @ moments.inputs + ridge * direction) * mask
        length = energy / (direction * moved).sum(2, keepdim=True).clamp_min(TINY)
        added += length * direction
        left -= length * moved
        turned = scale * left
        energy, last = (left * turned).sum(2, keepdim=True), energy
        direction = turned + energy / last.clamp_min(TINY) * direction
    return added


def _add(layer: Any, added: Tensor) -> None:
    weight = layer.weight
    features = weight[0].numel()
    with torch.no_grad():
        fitted = weight + added[..., :features].reshape(weight.shape).to(weight.dtype)
        weight.copy_(torch.where((weight != 0) & (fitted != 0), fitted, weight))
        if _fits_bias(layer):
            layer.bias += added[..., features].flatten().to(layer.bias.dtype)


def _fits_bias(layer: Any) -> bool:
    return layer.bias is not None and bool(layer.bias.requires_grad)


def _can_be_fitted(module: nn.Module, path: str) -> bool:
    layer = dict(module.named_modules()).get(path)
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) or layer.weight[0].numel() > MOST_INPUTS:
        return False
    owners = [other for other in module.modules() if any(w is layer.weight for w in other.parameters(recurse=False))]
    return len(owners) == 1


class _Seen(BaseException):
    """Raised by a hook once the layer has run: the rest of the forward is of no use. No `except Exception` takes it."""


def _in_order(module: nn.Module, paths: Sequence[str], run: ModuleRun) -> list[str]:
    """The paths in the order in which their layers run; those that do not run exactly once are left out."""
    ran: list[str] = []
    hooks = [module.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path)) for path in paths]
    try:
        args, kwargs, _ = next(run.calls())
        with evaluating(module):
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in dict.fromkeys(ran) if ran.count(path) == 1]


def _seen(module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """What a layer reads and gives in a forward of the whole module."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        seen.append((given[0] if given else next(iter(named.values())), output))
        raise _Seen

    hook = module.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    try:
        with evaluating(module):
            module(*args, **kwargs)
    except _Seen:
        pass
    finally:
        hook.remove()
    return seen[0]


def _moments(module: nn.Module, before: nn.Module, path: str, run: ModuleRun) -> Moments:
    layer: Any = module.get_submodule(path)
    generator = torch.Generator().manual_seed(run.seed)
    parts = []
    for args, kwargs, _ in run.calls():
        wanted = _seen(before, path, args, kwargs)[1]
        read, given = _seen(module, path, args, kwargs)
        enough = max(FEWEST_ROWS, ROWS_PER_INPUT * layer.weight[0].numel()) // len(run.statistics.batches) + 1
        for rows, residuals in _rows(layer, read.float(), (wanted - given).float(), enough, generator):
            parts.append(Moments(rows.mT @ rows, residuals.mT @ rows))
            if len(parts) > 1:
                parts = [Moments(parts[0].inputs + parts[1].inputs, parts[0].residuals + parts[1].residuals)]
    return parts[0]


def _rows(
    layer: Any, read: Tensor, residual: Tensor, enough: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs (groups, rows, F), a 1 behind them where there is a bias, and residuals (groups, rows, O of a group)."""
    if isinstance(layer, nn.Linear):
        rows, wanted = read.reshape(1, -1, read.shape[-1]), residual.reshape(1, -1, residual.shape[-1])
        yield _drawn(layer, rows, wanted, enough, generator)
        return
    each = max(1, enough // max(1, len(read))) + 1  # positions of one sample that are enough
    for part, wanted in zip(torch.split(padded(layer, read), SAMPLES), torch.split(residual, SAMPLES), strict=True):
        patches = patches_of(layer, part)
        rows, split = _by_group(patches, layer.groups), _by_group(wanted.flatten(2), layer.groups)
        yield _drawn(layer, rows, split, each * len(part), generator)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """From (N, groups * F, positions) to (groups, N * positions, F)."""
    return values.reshape(len(values), groups, -1, values.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)


def _drawn(layer: Any, rows: Tensor, wanted: Tensor, enough: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if rows.shape[1] > enough:
        chosen = torch.randperm(rows.shape[1], generator=generator)[:enough].to(rows.device)
        rows, wanted = rows[:, chosen], wanted[:, chosen]
    if _fits_bias(layer):
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    return rows, wanted
