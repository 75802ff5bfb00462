"""Layers that lost inputs, fitted anew to give what they gave before: a closed form, on inputs without labels.

What it does: layer after layer, in the order in which they run, takes what the layer reads in the smaller model, U
(rows, features; a convolution's patches), and what it gave in the model before, Y, and adds to its weight W the ridge
regression of the difference: dW = (U'U + l I)^-1 U'(Y - U W), with l = RIDGE of the mean of U'U's diagonal. So inputs
that stay stand in for those that are gone, and for all that changed further up. The ridge pulls towards the weights
that were there: a direction that no input shows stays as it is. It costs one forward of each model over one batch.
Source: ThiNet (arXiv:1707.06342) and channel pruning (arXiv:1707.06168); here the target is the model before, and the
inputs are those of the smaller one with everything above fitted already, so that errors do not add up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.measure.own_cost import evaluating
from omgoptim.techniques.probe import Probe, quiet
from omgoptim.techniques.prune._channels.layer_widths import is_depthwise, width_of
from omgoptim.techniques.reconstruction.batch import one_batch
from omgoptim.techniques.reconstruction.patches import padded, patches_of
from omgoptim.techniques.registry import ModuleRun

RIDGE = 0.1
MOST_FEATURES = 8192
"""A layer that reads more is left as it is: its second moments alone would take half a gigabyte."""

FEWEST_ROWS, ROWS_PER_FEATURE = 10_000, 10
"""How many rows are enough: of more, some are drawn."""

MOST_TARGETS = 2**26
"""Numbers of Y that are kept at once; with more, the layers are fitted in several forwards."""

CHUNK = 2**24
"""Numbers of U at once."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One layer to fit."""

    path: str
    outputs: Tensor | None
    """Channels of its output in the model before that are left; None for all."""
    target_size: int
    """How many numbers of Y are kept for it."""


@dataclass(frozen=True, slots=True)
class _Target:
    """What a layer gave, on some rows; a row is a position of a sample."""

    shape: torch.Size
    """Of the output that the rows are of, without its channels."""
    rows: Tensor
    """(R,) ascending."""
    given: Tensor
    """(R, outputs)."""


def refit(module: nn.Module, before: nn.Module, left: Mapping[tuple[str, str], Tensor], run: ModuleRun) -> list[str]:
    """Fit every layer of `module` that lost inputs to what it gave in `before`.

    Args:
        module: the smaller model; its weights are changed.
        before: the same model before the removal; not changed.
        left: side of a layer to the positions that are left of those that it had in `before`.

    Returns:
        Paths of the layers that were fitted, in the order in which they run.
    """
    lost = [
        path
        for (path, side), kept in left.items()
        if side == "in"
        and _can_be_fitted(layer := before.get_submodule(path))
        and len(kept) < (width_of(layer, "in") or 0)
    ]
    if not lost or not run.statistics.count:
        return []
    call = one_batch(before, run)
    masks = _masks(call, run)
    tasks, fitted = _tasks(module, call, lost, left, run), list[str]()
    for stage in _stages(tasks):
        targets: dict[str, _Target] = {}

        def remember(task: _Task, layer: nn.Module, _: Any, given: Tensor, into: dict[str, _Target] = targets) -> None:
            into[task.path] = _drawn(layer, given, task, masks, run.seed)

        def fit(task: _Task, layer: nn.Module, read: Tensor, _: Any, of: dict[str, _Target] = targets) -> None:
            run.progress(f"fitting {task.path}", len(fitted) / len(tasks))
            if _fit(layer, read.detach(), of.pop(task.path)):
                fitted.append(task.path)

        _forward(before, call, stage, remember, after=True)
        _forward(module, call, stage, fit, after=False)
    return fitted


def _inputs(layer: nn.Module) -> int:
    return width_of(layer, "in") or 0


def _can_be_fitted(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features <= MOST_FEATURES
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)) or is_depthwise(layer) or layer.padding_mode != "zeros":
        return False
    return layer.weight[0].numel() <= MOST_FEATURES


# Forwards over one batch


class _Enough(BaseException):
    """Raised by a hook when the last layer has run: the rest is of no use. No `except Exception` takes it."""


def _forward(
    module: nn.Module, call: Probe, tasks: list[_Task], do: Callable[[_Task, nn.Module, Any, Any], None], *, after: bool
) -> None:
    """A forward that does something after, or before, each of the tasks' layers; it ends with the last of them."""

    def hook(task: _Task) -> Callable[..., None]:
        def act(layer: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            do(task, layer, args[0] if args else next(iter(kwargs.values())), output)
            if task is tasks[-1]:
                raise _Enough

        return act

    layers = [(module.get_submodule(task.path), task) for task in tasks]
    hooks = [
        layer.register_forward_hook(hook(task), with_kwargs=True)
        if after
        else layer.register_forward_pre_hook(hook(task), with_kwargs=True)
        for layer, task in layers
    ]
    try:
        with evaluating(module), quiet():
            module(*call.args, **call.kwargs)
    except _Enough:
        pass
    finally:
        for each in hooks:
            each.remove()


def _tasks(
    module: nn.Module, call: Probe, paths: list[str], left: Mapping[tuple[str, str], Tensor], run: ModuleRun
) -> list[_Task]:
    """What there is to fit, in the order in which it runs; a layer that runs more than once has no one target."""
    calls: list[tuple[str, int]] = []

    def noting(path: str) -> Callable[..., None]:
        return lambda layer, _args, given: calls.append((path, given.numel() // given.shape[_axis(layer)]))

    hooks = [module.get_submodule(path).register_forward_hook(noting(path)) for path in paths]
    small = Probe.of(run)
    try:
        small.outputs(module)
    finally:
        for hook in hooks:
            hook.remove()
    more = call.samples / small.samples
    once = Counter(path for path, _ in calls)
    tasks = []
    for path, rows in calls:
        layer: Any = module.get_submodule(path)
        if once[path] == 1:
            size = min(int(rows * more), _enough(layer)) * layer.weight.shape[0]
            tasks.append(_Task(path, left.get((path, "out")), size))
    return tasks


def _stages(tasks: list[_Task]) -> Iterator[list[_Task]]:
    """The tasks in portions whose targets fit into memory."""
    portion: list[_Task] = []
    for task in tasks:
        if portion and sum(each.target_size for each in (*portion, task)) > MOST_TARGETS:
            yield portion
            portion = []
        portion.append(task)
    if portion:
        yield portion


# One layer


def _axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _enough(layer: Any) -> int:
    return max(FEWEST_ROWS, ROWS_PER_FEATURE * int(layer.weight[0].numel()))


def _without_channels(layer: nn.Module, given: Tensor) -> torch.Size:
    return given.select(_axis(layer), 0).shape


def _masks(call: Probe, run: ModuleRun) -> list[Tensor]:
    """Inputs that say which positions are real: what a model makes of padding is of no use to anyone."""
    positional = iter(call.args)
    inputs = {t.name: call.kwargs[t.name] if t.keyword else next(positional) for t in run.signature.inputs}
    return [tensor.bool() for name, tensor in inputs.items() if "mask" in name and not tensor.is_floating_point()]


def _drawn(layer: nn.Module, given: Tensor, task: _Task, masks: list[Tensor], seed: int) -> _Target:
    """The channels that are left, on enough rows of what a layer gave, padding left out."""
    if task.outputs is not None:
        given = given.index_select(_axis(layer), task.outputs.to(given.device))
    shape = _without_channels(layer, given)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(shape.numel())
    for mask in masks:
        if mask.shape == shape and bool(mask.any()):
            rows = mask.cpu().flatten().nonzero().flatten()
    chosen = torch.randperm(len(rows), generator=generator)[: _enough(layer)]
    rows = rows[chosen].sort().values.to(given.device)
    if isinstance(layer, nn.Linear):
        return _Target(shape, rows, given.reshape(-1, given.shape[-1])[rows])
    flat = given.flatten(2)
    return _Target(shape, rows, flat[rows // flat.shape[2], :, rows % flat.shape[2]])


def _fit(layer: Any, read: Tensor, target: _Target) -> bool:
    """Change a layer's weight so that of what it reads it makes what it gave before; whether that could be done."""
    groups, features = getattr(layer, "groups", 1), layer.weight[0].numel()
    weight = layer.weight.detach().float().flatten(1).view(groups, -1, features)  # (groups, outputs, features)
    biased = layer.bias is not None
    size = features + biased
    moments = torch.zeros(groups, size, size, dtype=torch.float64, device=read.device)
    crossed = torch.zeros(groups, size, weight.shape[1], dtype=torch.float64, device=read.device)
    for rows, chosen in _features(layer, read, target):
        known = rows.float().view(len(rows), groups, features).transpose(0, 1)
        wanted = target.given[chosen].float().view(len(rows), groups, -1).transpose(0, 1)
        missing = wanted - known @ weight.mT
        if biased:
            missing = missing - layer.bias.detach().float().view(groups, 1, -1)
            known = torch.cat([known, known.new_ones(*known.shape[:2], 1)], 2)
        moments += known.mT @ known
        crossed += known.mT @ missing
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True).clamp_min(1e-12)
    factor, failed = torch.linalg.cholesky_ex(moments)
    step = torch.cholesky_solve(crossed, factor).mT  # (groups, outputs, size)
    if bool(failed.any()) or not bool(torch.isfinite(step).all()):
        return False  # infinite or NaN activations
    with torch.no_grad():
        layer.weight += step[..., :features].reshape(layer.weight.shape).to(layer.weight.dtype)
        if biased:
            layer.bias += step[..., features].flatten().to(layer.bias.dtype)
    return True


def _features(layer: Any, read: Tensor, target: _Target) -> Iterator[tuple[Tensor, slice]]:
    """U in portions: what the layer reads for each of the target's rows (r, groups * F), and which rows these are."""
    if isinstance(layer, nn.Linear):
        flat = read.reshape(-1, read.shape[-1])
        portion = max(1, CHUNK // flat.shape[1])
        for start in range(0, len(target.rows), portion):
            chosen = slice(start, start + portion)
            yield flat[target.rows[chosen]], chosen
        return
    images = padded(layer, read)
    positions = math.prod(target.shape[1:])
    portion = max(1, CHUNK // (positions * layer.weight[0].numel() * layer.groups))
    for start in range(0, len(read), portion):
        first, last = torch.searchsorted(
            target.rows, torch.tensor([start * positions, (start + portion) * positions], device=read.device)
        ).tolist()
        if first < last:
            patches = patches_of(layer, images[start : start + portion])
            rows = target.rows[first:last] - start * positions
            yield patches[rows // positions, :, rows % positions], slice(first, last)
