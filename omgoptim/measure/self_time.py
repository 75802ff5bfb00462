"""Self time and self cost of a module's layers, without their children, and its slowest layers.

A cost is any monotone counter that can be read at any moment: a clock, a counter of operations.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from omgoptim.reports import Layer

ROOT = "(model)"
"""Path of the model itself: the work that its own forward does outside its children."""

MIN_CALLS = 5
"""Minimum number of calls for a median. Chosen: two of five may be disturbed."""

MAX_CALLS = 1000
"""Maximum number of calls, for small models. Chosen: more do not narrow a median noticeably."""


def module_paths(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return path and module once for every module; one that is used in several places has its first path."""
    return ((path or ROOT, part) for path, part in module.named_modules())


@contextlib.contextmanager
def self_cost(module: nn.Module, read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Attribute the increase of `read()` to the module whose forward is running, while the context is open.

    Yields:
        A dict of path to cost that fills as the model is called. Modules that are not called are not in it. A module
        whose children are bypassed (attention that hands its projection's weight to a kernel) carries the cost itself.
    """
    costs: dict[str, float] = defaultdict(float)
    running: list[_RunningForward] = []

    def enter(*_: object) -> None:
        running.append(_RunningForward(read()))

    def leave(path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            end, call = read(), running.pop()
            costs[path] += end - call.start - call.in_children
            if running:
                running[-1].in_children += end - call.start

        return hook

    with contextlib.ExitStack() as stack:
        for path, part in module_paths(module):
            # First in, last out: other hooks of the module, if it has any, count as the module's own work.
            stack.callback(part.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(part.register_forward_hook(leave(path), always_call=True).remove)
        yield costs


class _RunningForward:
    """A running forward: the value of `read` at its start, and the cost of its children since."""

    __slots__ = ("in_children", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        self.in_children = 0.0


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set every part to eval mode without gradients, and restore the modes; exported programs included."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad(), _plain_attention():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Disable nn.Transformer's fast path, which hides its layers from hooks and its operations from counters."""
    enabled: bool = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def costliest_layers(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    macs_by_path: Mapping[str, int],
    top: int = 10,
    seconds: float = 1.0,
) -> list[Layer]:
    """Call a model for `seconds` and return the layers by self time, the slowest first.

    A module's time is that of its own forward without its children, so a module that computes in its own forward
    (attention, functional calls) counts fully, and a container only counts the calls of its children. The hooks add
    some microseconds to every module and disable nn.Transformer's fused path: the times show the distribution over
    layers, not the latency of the model. On a loaded machine with several threads a small layer that waits for a thread
    can look slow, the more so the fewer calls there were. The module is as it was afterwards.

    Args:
        module: the model, run in eval mode.
        args: positional inputs, batch 1.
        kwargs: inputs by name, batch 1.
        macs_by_path: `MacsCount.by_path`.
        top: how many layers to give.
        seconds: for how long to call the model, after one call to warm up; at least five calls, at most a thousand.

    Returns:
        One `Layer` per module that was called: the median over the calls, and its share of the sum of all medians.
    """
    times = _own_times_ms(module, args, kwargs, seconds)
    medians = {path: statistics.median(calls) for path, calls in times.items()}
    total = sum(medians.values())
    parts = dict(module_paths(module))
    return [
        Layer(
            path=path,
            kind=type(parts[path]).__name__,
            time_ms=medians[path],
            time_share=medians[path] / total if total > 0 else None,
            macs=macs_by_path.get(path),
            size_bytes=sum(p.numel() * p.element_size() for p in parts[path].parameters(recurse=False)),
        )
        for path in sorted(medians, key=lambda path: -medians[path])[:top]
    ]


def _own_times_ms(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float
) -> dict[str, list[float]]:
    """Map path to self time in ms, one number per call of the model; several uses in one call add up."""
    times: dict[str, list[float]] = defaultdict(list)
    with contextlib.redirect_stdout(sys.stderr), evaluation_mode(module), self_cost(module, _clock_ms(module)) as costs:
        module(*args, **kwargs)
        end = time.perf_counter() + seconds
        for call in range(MAX_CALLS):
            if call >= MIN_CALLS and time.perf_counter() >= end:
                break
            costs.clear()
            module(*args, **kwargs)
            for path, spent in costs.items():
                times[path].append(spent)
    return times


def _clock_ms(module: nn.Module) -> Callable[[], float]:
    """Return a clock in ms that waits for the device of the model."""
    on_gpu = any(parameter.is_cuda for parameter in module.parameters())

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    return now
