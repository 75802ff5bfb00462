"""Fit the kept layers to the outputs of the removed layers after them.

A kept layer replaces itself and the removed layers up to the next kept one: its span. Most layers end by adding a
Linear's output to a residual stream, possibly with a normalization after it (transformers, residual MLPs). The Linear
is fitted by ridge regression so that the sum becomes that of the teacher at the end of the span, on training inputs
without labels, each layer on the outputs of the fitted ones before it; the normalization there is copied too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import attached
from omgoptim.techniques.reconstruction.inputs import (
    Hook,
    StopForward,
    forward_hooks,
    padding_mask,
    run_until_stopped,
    unpadded_rows,
)
from omgoptim.techniques.reconstruction.least_squares import ridge
from omgoptim.techniques.registry import ModuleRun

PRIOR_DAMPING = 1e-3
"""Damping towards the former weight, of an input's mean energy. Chosen small: for directions without samples."""

SUM_TOLERANCE = 1e-3
"""Relative difference of two sums of float32 layers that differ only in the order of additions, with a margin: one
rounding is 6e-8, and a layer has some thousand."""


@dataclass(frozen=True, slots=True)
class Span:
    """A kept layer, and the last layer that it replaces."""

    kept: str
    """Path in the student."""
    end: str
    """Path in the teacher."""


@dataclass(frozen=True, slots=True)
class _Writer:
    """End of a layer: a Linear that is added to a stream, which is then normalized or is the layer's output."""

    linear: str
    norm: str | None
    """Paths inside the layer."""


def fit_spans(module: nn.Module, teacher: nn.Module, spans: Sequence[Span], run: ModuleRun) -> list[str]:
    """Fit the layers of a student in turn, in place.

    Args:
        module: the student, on the run's device.
        teacher: on the run's device; not changed.
        spans: in the order in which the layers run.
        run: how both are called, and the batches to fit on.

    Returns:
        The layers that were fitted; one that ends in another way, or loses by being fitted, stays as it is.
    """
    fitted = []
    fast = torch.backends.mha.get_fastpath_enabled()  # its fused layers call none of the modules inside
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for span in spans:
            writer = _find_writer(module, span.kept, run)
            if writer is not None and _fit(module, teacher, span, writer, run):
                fitted.append(span.kept)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return fitted


def _find_writer(module: nn.Module, path: str, run: ModuleRun) -> _Writer | None:
    """Return the last Linear of a layer, if its output is added to the stream that becomes the layer's output."""
    layer = module.get_submodule(path)
    leaves = {inner: part for inner, part in layer.named_modules() if not part._modules and inner}
    order: list[str] = []
    _run_with_hooks(module, run, {f"{path}.{inner}": lambda *_, inner=inner: order.append(inner) for inner in leaves})
    linears = [inner for inner in order if type(leaves[inner]) is nn.Linear]
    if not linears or order.count(linears[-1]) > 1:
        return None
    later = order[order.index(linears[-1]) + 1 :]
    after = [inner for inner in later if next(leaves[inner].parameters(), None) is not None]
    if len(after) > 1 or (after and not type(leaves[after[0]]).__name__.endswith("Norm")):
        return None
    writer = _Writer(linears[-1], after[0] if after else None)
    return writer if _is_added(module, path, writer, run) else None


def _is_added(module: nn.Module, path: str, writer: _Writer, run: ModuleRun) -> bool:
    """Return whether a change of the Linear's output changes the sum after it by the same amount."""
    noises: list[Tensor] = []

    def add_noise(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(run.seed)
        noise = torch.randn(output.shape, generator=generator).to(output) * output.std()
        noises.append(noise)
        return output + noise

    sums = _sums(module, path, writer, run)
    with attached([module.get_submodule(f"{path}.{writer.linear}").register_forward_hook(add_noise)]):
        shifted = _sums(module, path, writer, run)
    if len(sums) != 1 or len(shifted) != 1 or sums[0].shape != noises[0].shape:
        return False
    expected = sums[0] + noises[0]
    return bool((shifted[0] - expected).abs().max() <= SUM_TOLERANCE * expected.abs().max())


def _sums(module: nn.Module, path: str, writer: _Writer, run: ModuleRun) -> list[Tensor]:
    """Return the final sum of a layer, of the first batch."""
    found: list[Tensor] = []
    _run_with_hooks(module, run, _sum_hook(path, writer, found.append))
    return found


def _sum_hook(path: str, writer: _Writer, capture: Callable[[Tensor], None]) -> dict[str, Hook]:
    """Return a hook that captures the sum: before the normalization, or after the layer."""
    if writer.norm is not None:
        return {f"{path}.{writer.norm}": lambda _layer, read, _output: capture(read)}

    def read_output(_layer: nn.Module, _read: Any, output: Any) -> None:
        capture(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))

    return {path: read_output}


def _run_with_hooks(module: nn.Module, run: ModuleRun, hooks: Mapping[str, Hook]) -> None:
    """Run the module on the first batch with hooks."""
    with forward_hooks(module, hooks), evaluation_mode(module):
        args, kwargs, _target = next(run.calls())
        module(*args, **kwargs)


def _fit(module: nn.Module, teacher: nn.Module, span: Span, writer: _Writer, run: ModuleRun) -> bool:
    """Fit the Linear of one layer; False where it stays as it was."""
    layer = module.get_submodule(span.kept)
    linear = layer.get_submodule(writer.linear)
    if not isinstance(linear, nn.Linear):
        return False
    size = linear.in_features + 1
    gram = torch.zeros(size, size, dtype=torch.float64, device=linear.weight.device)
    cross = torch.zeros(size, linear.out_features, dtype=torch.float64, device=linear.weight.device)
    energy = 0.0
    for input_rows, output, layer_sum, teacher_sum in _rows(module, teacher, span, writer, run):
        constant = torch.full_like(input_rows[:, :1], float(linear.bias is not None))
        inputs = torch.cat([input_rows, constant], 1)
        target = teacher_sum - (layer_sum - output)  # the stream beside the Linear stays what it is
        gram += inputs.mT @ inputs  # products of one batch in float32, their sum in float64
        cross += inputs.mT @ target
        energy += float(target.double().square().sum())
    bias = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
    before = torch.cat([linear.weight, bias[:, None]], 1).detach().double().mT
    solved = ridge(gram, cross, PRIOR_DAMPING, prior=before)
    errors = [float(energy - 2 * (x * cross).sum() + (x * (gram @ x)).sum()) for x in (before, solved)]
    if not (bool(solved.isfinite().all()) and errors[1] < errors[0]):
        return False
    with torch.no_grad():
        linear.weight.copy_(solved[:-1].mT)
        if linear.bias is not None:
            linear.bias.copy_(solved[-1])
    if writer.norm is not None:
        norm = teacher.get_submodule(span.end).get_submodule(writer.norm)
        layer.get_submodule(writer.norm).load_state_dict(norm.state_dict())
    return True


def _rows(
    module: nn.Module, teacher: nn.Module, span: Span, writer: _Writer, run: ModuleRun
) -> Iterator[tuple[Tensor, ...]]:
    """Yield per batch the rows of real positions: the Linear's input and output, the layer's sum, the teacher's."""
    captured: dict[str, Tensor] = {}

    def last(name: str) -> Callable[[Tensor], None]:
        def keep(value: Tensor) -> None:
            captured[name] = value
            raise StopForward

        return keep

    def linear(_layer: nn.Module, read: Tensor, output: Tensor) -> None:
        captured["input"], captured["output"] = read, output

    student_hooks = {f"{span.kept}.{writer.linear}": linear, **_sum_hook(span.kept, writer, last("sum"))}
    teacher_hooks = _sum_hook(span.end, writer, last("teacher_sum"))
    with (
        forward_hooks(module, student_hooks),
        forward_hooks(teacher, teacher_hooks),
        evaluation_mode(module),
        evaluation_mode(teacher),
    ):
        for args, kwargs, _target in run.calls():
            for each in (module, teacher):
                run_until_stopped(each, args, kwargs)
            named = dict(zip(run.signature.input_names, (*args, *kwargs.values()), strict=True))
            real = padding_mask(named)
            yield tuple(
                unpadded_rows(captured[name], real).float() for name in ("input", "output", "sum", "teacher_sum")
            )
