"""Layer-by-layer reconstruction: fit the layers of a changed model to their outputs in the model before.

The layers are fitted in the order in which they run, on one joint batch, each on the inputs that the fitted layers
before it give: U (rows, features; the patches of a convolution). What is added to a weight W is the solution for the
residual Y - U W of the output Y in the model before. A layer is fitted in a hook before it runs, so that the same
forward goes on with its new weight: one forward of each model for as many layers as `MAX_TARGET_VALUES` allows, and no
forward per layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.techniques.probe import Probe, quiet_output
from omgoptim.techniques.reconstruction.inputs import (
    Hook,
    StopForward,
    chunks_by_size,
    forward_hooks,
    one_batch,
    padded,
    padding_mask,
    patches_of,
    run_until_stopped,
)
from omgoptim.techniques.registry import ModuleRun

MAX_TARGET_VALUES = 2**26
"""Maximum values of Y in memory, 256 MiB in float32. Chosen: with more, the layers are fitted in several forwards."""

CHUNK = 2**24
"""Maximum values of U in memory, 64 MiB in float32. Chosen by memory."""


@dataclass(frozen=True, slots=True)
class LayerFit:
    """Solver and number of rows of a layer fit."""

    solve: Callable[[Any, Tensor, Tensor], Tensor]
    """`solve(layer, gram, cross)`: what to add, (groups, features, outputs of a group), from U'U (groups, features,
    features) and U'(Y - U W) (groups, features, outputs of a group); with a bias that can be fitted, the last feature
    is 1."""
    min_rows: int
    rows_per_feature: int

    def rows(self, layer: Any) -> int:
        """Maximum rows that a layer is fitted on."""
        return max(self.min_rows, self.rows_per_feature * int(layer.weight[0].numel()))


@dataclass(frozen=True, slots=True)
class _Task:
    """One layer to fit."""

    path: str
    outputs: Tensor | None
    """Kept channels of its output in the original; None for all."""
    max_rows: int
    target_size: int
    """Values of Y of this layer in memory."""
    probed_rows: int
    """Rows of its output on the few samples of the probe."""


@dataclass(frozen=True, slots=True)
class _Target:
    """Outputs of a layer on some rows; a row is a position of a sample."""

    shape: torch.Size
    """Shape of the output that the rows are of, without its channels."""
    rows: Tensor
    """(R,) ascending."""
    outputs: Tensor
    """(R, outputs)."""


def fits_bias(layer: Any) -> bool:
    """Return whether a layer has a bias that may change."""
    return layer.bias is not None and bool(layer.bias.requires_grad)


def fit_in_order(
    module: nn.Module, before: nn.Module, outputs: Mapping[str, Tensor | None], run: ModuleRun, fit: LayerFit
) -> list[str]:
    """Fit layers of `module` to their outputs in `before`.

    Args:
        module: its weights and biases are changed.
        before: the same model before; not changed.
        outputs: path of each layer to the channels of its output in `before` that `module` still has; None for all.
        run: how both are called, and the batches to fit on.
        fit: how.

    Returns:
        Paths of the fitted layers, in the order in which they run. A layer that runs more than once has no one target
        and is left out, as is one whose rows depend on values (an expert), since the models may choose other samples
        for it, and one whose solution is not finite.
    """
    if not outputs or not run.statistics.count:
        return []
    call = one_batch(before, run)
    real = padding_mask(_named(call, run))
    tasks, fitted = _tasks(module, call, outputs, run, fit), list[str]()
    for stage in chunks_by_size(tasks, lambda task: task.target_size, MAX_TARGET_VALUES):
        targets: dict[str, _Target] = {}

        def remember(task: _Task, layer: nn.Module, _: Any, output: Tensor, into: dict[str, _Target] = targets) -> None:
            rows = _without_channels(layer, output).numel()
            if rows and (rows == task.probed_rows or not rows % call.samples):
                into[task.path] = _sample_rows(layer, output, task, real, run.seed)

        def solve(task: _Task, layer: nn.Module, read: Tensor, _: Any, of: dict[str, _Target] = targets) -> None:
            run.progress(f"fitting {task.path}", len(fitted) / len(tasks))
            target = of.pop(task.path, None)
            if target and read.shape[:1] == target.shape[:1] and _fit(layer, read.detach(), target, fit):
                fitted.append(task.path)

        _forward(before, call, stage, remember, before=False)
        _forward(module, call, stage, solve, before=True)
    return fitted


def _forward(
    module: nn.Module,
    call: Probe,
    tasks: list[_Task],
    action: Callable[[_Task, nn.Module, Any, Any], None],
    *,
    before: bool,
) -> None:
    """Run a forward with a hook before, or after, each task's layer; it ends with the last of them."""

    def hook(task: _Task) -> Hook:
        def act(layer: nn.Module, read: Any, output: Any) -> None:
            action(task, layer, read, output)
            if task is tasks[-1]:
                raise StopForward

        return act

    with forward_hooks(module, {task.path: hook(task) for task in tasks}, before=before), quiet_output():
        run_until_stopped(module, call.args, call.kwargs)


def _tasks(
    module: nn.Module, call: Probe, outputs: Mapping[str, Tensor | None], run: ModuleRun, fit: LayerFit
) -> list[_Task]:
    """Return the layers that run exactly once, in the order in which they run."""
    calls: list[tuple[str, int]] = []

    def record(path: str) -> Hook:
        return lambda layer, _read, given: calls.append((path, given.numel() // given.shape[_axis(layer)]))

    probe = Probe.of(run)
    with forward_hooks(module, {path: record(path) for path in outputs}):
        probe.outputs(module)
    ratio = call.samples / probe.samples
    call_counts = Counter(path for path, _ in calls)
    tasks = []
    for path, rows in calls:
        layer: Any = module.get_submodule(path)
        if call_counts[path] == 1:
            size = min(int(rows * ratio), fit.rows(layer)) * layer.weight.shape[0]
            tasks.append(_Task(path, outputs[path], fit.rows(layer), size, rows))
    return tasks


def _axis(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _without_channels(layer: nn.Module, output: Tensor) -> torch.Size:
    return output.select(_axis(layer), 0).shape


def _named(call: Probe, run: ModuleRun) -> dict[str, Tensor]:
    positional = iter(call.args)
    return {t.name: call.kwargs[t.name] if t.keyword else next(positional) for t in run.signature.inputs}


def _sample_rows(layer: nn.Module, outputs: Tensor, task: _Task, real: Tensor | None, seed: int) -> _Target:
    """Return a layer's outputs in the kept channels, on enough rows without padding."""
    if task.outputs is not None:
        outputs = outputs.index_select(_axis(layer), task.outputs.to(outputs.device))
    shape = _without_channels(layer, outputs)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(shape.numel())
    if real is not None and real.shape == shape:
        rows = real.cpu().flatten().nonzero().flatten()
    chosen = torch.randperm(len(rows), generator=generator)[: task.max_rows]
    rows = rows[chosen].sort().values.to(outputs.device)
    if isinstance(layer, nn.Linear):
        return _Target(shape, rows, outputs.reshape(-1, outputs.shape[-1])[rows])
    flat = outputs.flatten(2)
    return _Target(shape, rows, flat[rows // flat.shape[2], :, rows % flat.shape[2]])


def _fit(layer: Any, read: Tensor, target: _Target, fit: LayerFit) -> bool:
    """Fit a layer's weight and bias to its target; False if the solution is not finite."""
    groups, features = getattr(layer, "groups", 1), layer.weight[0].numel()
    weight = layer.weight.detach().float().flatten(1).view(groups, -1, features)  # (groups, outputs, features)
    biased = fits_bias(layer)
    size = features + biased
    moments = torch.zeros(groups, size, size, dtype=torch.float64, device=read.device)
    crossed = torch.zeros(groups, size, weight.shape[1], dtype=torch.float64, device=read.device)
    for rows, chosen in _features(layer, read, target):
        inputs = rows.float().view(len(rows), groups, features).transpose(0, 1)
        target_outputs = target.outputs[chosen].float().view(len(rows), groups, -1).transpose(0, 1)
        residual = target_outputs - inputs @ weight.mT
        if layer.bias is not None:
            residual = residual - layer.bias.detach().float().view(groups, 1, -1)
        if biased:
            inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
        moments += inputs.mT @ inputs
        crossed += inputs.mT @ residual
    step = fit.solve(layer, moments, crossed).mT  # (groups, outputs, size)
    if not bool(torch.isfinite(step).all()):
        return False  # infinite or NaN activations
    with torch.no_grad():
        layer.weight += step[..., :features].reshape(layer.weight.shape).to(layer.weight.dtype)
        if biased:
            layer.bias += step[..., features].flatten().to(layer.bias.dtype)
    return True


def _features(layer: Any, read: Tensor, target: _Target) -> Iterator[tuple[Tensor, slice]]:
    """Yield U in portions: the layer's inputs for each of the target's rows (r, groups * F), and the rows' indices."""
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
