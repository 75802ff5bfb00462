"""Second moments of layer inputs, and the influence of layer outputs on the model's outputs.

The second moment and the mean of each layer's inputs are read by hooks while the model runs on samples of the train
split, without labels. Positions that a batch's `attention_mask` marks as padding are left out, where a layer's input is
(batch, positions, channels). The influence of an output y on the model's own outputs z is G = E[Jᵀ J] with J = dz/dy,
read from gradients of random combinations of z (each of its tensors scaled to size 1): E|J (change of y)|² is what the
model's outputs change by, to first order. That needs no labels either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import attached
from omgoptim.runtimes.signature import flatten
from omgoptim.techniques.factorize._low_rank.layer_selection import shared_inputs
from omgoptim.techniques.probe import LayerCalls, layer_calls
from omgoptim.techniques.reconstruction.inputs import (
    DenseLayer,
    Hook,
    batches_of,
    call_tensors,
    chunks_by_size,
    forward_hooks,
    input_rows,
    output_rows,
    padding_mask,
)
from omgoptim.techniques.registry import ModuleRun

MAX_MOMENT_INPUTS = 12_288
"""Maximum inputs of a layer for a second moment. Chosen by memory: its square in float64 is 1.2 GB."""

MAX_PASS_BYTES = 1_500_000_000
"""Bytes of moments that are accumulated in one pass over the samples. Chosen: more memory, fewer passes."""

INFLUENCE_SAMPLES = 128
"""Samples for the influence, a rough weighting. Chosen: each costs a backward pass."""


@dataclass(slots=True)
class InputMoments:
    """Moments of the inputs x of a layer, per group: sums until `finish`, then means."""

    mean: Tensor
    """E[x]: (groups, in)."""
    second: Tensor | None
    """E[x xᵀ]: (groups, in, in); None for a Linear wider than `MAX_MOMENT_INPUTS`."""
    outputs: Tensor | None
    """E[y yᵀ] of y = W x, (groups, out, out), where `second` is None."""
    rows: int = 0
    """Number of rows."""

    def finish(self) -> None:
        if self.rows:
            for part in (self.mean, self.second, self.outputs):
                if part is not None:
                    part /= self.rows

    @property
    def are_finite(self) -> bool:
        return all(bool(part.isfinite().all()) for part in (self.mean, self.second, self.outputs) if part is not None)


def fan_in(layer: DenseLayer) -> int:
    """Return the number of inputs of one output of a layer."""
    return layer.weight[0].numel()


def groups_of(layer: DenseLayer) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def input_moments(
    module: nn.Module, layers: Mapping[str, DenseLayer], run: ModuleRun, samples: int
) -> Iterator[tuple[str, InputMoments]]:
    """Yield path and moments of each layer, some layers per pass over the samples.

    Args:
        module: in any mode; run in eval mode.
        layers: path to Linear or Conv2d of it, each called in its forward.
        run: its statistics are the data.
        samples: how many of them to read.
    """
    leaders = moment_owners(layers, layer_calls(module, layers, run))
    for chunk in chunks_by_size(
        dict.fromkeys(leaders.values()), lambda path: moments_bytes(layers[path]), MAX_PASS_BYTES
    ):
        found = _one_pass(module, {path: layers[path] for path in chunk}, run, samples)
        yield from ((path, found[leader]) for path, leader in leaders.items() if leader in found)


def moment_owners(layers: Mapping[str, DenseLayer], uses: Mapping[str, LayerCalls]) -> dict[str, str]:
    """Return the path whose moments each path shares; a layer too wide for a second moment has its own."""
    leaders = shared_inputs(layers, uses)
    return {path: path if fan_in(layers[path]) > MAX_MOMENT_INPUTS else leader for path, leader in leaders.items()}


def moments_bytes(layer: DenseLayer) -> int:
    """Return the bytes of the moments of a layer's inputs."""
    side = len(layer.weight) // groups_of(layer) if fan_in(layer) > MAX_MOMENT_INPUTS else fan_in(layer)
    return 8 * groups_of(layer) * side**2


def _one_pass(
    module: nn.Module, layers: Mapping[str, DenseLayer], run: ModuleRun, samples: int
) -> dict[str, InputMoments]:
    found = {path: empty_moments(layer) for path, layer in layers.items()}
    real: Tensor | None = None

    def record(path: str) -> Hook:
        def hook(_layer: nn.Module, values: Tensor, _output: Any) -> None:
            add_rows(found[path], layers[path], input_rows(layers[path], values.detach(), real))

        return hook

    with evaluation_mode(module), forward_hooks(module, {path: record(path) for path in layers}, before=True):
        for batch in batches_of(run.statistics, samples):
            tensors = call_tensors(batch, run)
            real = padding_mask(tensors)
            args, kwargs = run.signature.to_call(tensors)
            module(*args, **kwargs)
    for moments in found.values():
        moments.finish()
    return found


def empty_moments(layer: DenseLayer) -> InputMoments:
    """Return empty sums in the shapes of a layer."""
    groups, width, place = groups_of(layer), fan_in(layer), layer.weight.device
    mean = torch.zeros(groups, width, dtype=torch.float64, device=place)
    if width > MAX_MOMENT_INPUTS:
        out = len(layer.weight) // groups
        return InputMoments(mean, None, torch.zeros(groups, out, out, dtype=torch.float64, device=place))
    return InputMoments(mean, torch.zeros(groups, width, width, dtype=torch.float64, device=place), None)


def add_rows(moments: InputMoments, layer: DenseLayer, rows: Tensor) -> None:
    """Add rows (groups, rows, in)."""
    moments.rows += rows.shape[1]
    moments.mean += rows.sum(1)
    if moments.second is not None:
        moments.second += rows.mT @ rows
    if moments.outputs is not None:
        outputs = rows @ layer.weight.detach().double().reshape(len(rows), -1, rows.shape[2]).mT
        moments.outputs += outputs.mT @ outputs


def output_influence(
    module: nn.Module, layers: Mapping[str, DenseLayer], run: ModuleRun, samples: int
) -> dict[str, Tensor]:
    """Return G (groups, out, out) of each layer by path, summed over a sample's rows; only layers with a gradient.

    Empty where the model has no gradient: outputs that are not floating point, an operation without a backward.
    """
    found: dict[str, Tensor] = {}
    calls: list[tuple[str, Tensor]] = []
    generator = torch.Generator().manual_seed(run.seed)

    def record(path: str) -> Any:
        def hook(_: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            calls.append((path, output))
            return output.clone()  # what comes next may write into it

        return hook

    samples_seen = 0
    handles = (layer.register_forward_hook(record(path)) for path, layer in layers.items())
    try:
        with attached(handles), evaluation_mode(module), torch.enable_grad():
            for batch in batches_of(run.statistics, min(samples, INFLUENCE_SAMPLES)):
                tensors = call_tensors(batch, run)
                real = padding_mask(tensors)
                calls.clear()
                args, kwargs = run.signature.to_call(tensors)
                combination = _random_combination(module(*args, **kwargs), real, generator)
                if combination is None:
                    return {}
                gradients = torch.autograd.grad(combination, [output for _, output in calls], allow_unused=True)
                for (path, _), gradient in zip(calls, gradients, strict=True):
                    if gradient is not None:
                        rows = output_rows(layers[path], gradient, real)
                        found[path] = found.get(path, rows.new_zeros(())) + rows.mT @ rows
                samples_seen += len(next(iter(tensors.values())))
    except RuntimeError:  # torch's word for an operation without a gradient: written in place, a recurrent kernel
        return {}
    finally:
        calls.clear()
    return {
        path: total / samples_seen
        for path, total in found.items()
        if bool(total.isfinite().all()) and bool(total.any())
    }


def _random_combination(result: Any, real: Tensor | None, generator: torch.Generator) -> Tensor | None:
    """Return the sum of all outputs, scaled to size 1, times random numbers; None if nothing has a gradient."""
    total: Tensor | None = None
    for leaf in flatten(result):
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad):
            continue
        size = leaf.detach().float().square().mean().sqrt()
        if not (size > 0 and size.isfinite()):
            continue
        factors = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype) / size.to(leaf.dtype)
        if real is not None and leaf.dim() >= 2 and leaf.shape[:2] == real.shape:
            factors = factors * real.reshape(*real.shape, *[1] * (leaf.dim() - 2))
        part = (leaf * factors).sum()
        total = part if total is None else total + part
    return total
