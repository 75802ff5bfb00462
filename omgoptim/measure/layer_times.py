"""Slowest layers of a module: the self time of each, its multiply-accumulates and its bytes."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from omgoptim.measure.self_time import evaluation_mode, module_paths, self_cost
from omgoptim.reports import Layer

MIN_CALLS = 5
"""Least calls behind a median."""
MAX_CALLS = 1000
"""Limit of the calls of a small model."""


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
    medians = {path: statistics.median(some) for path, some in times.items()}
    whole = sum(medians.values())
    parts = dict(module_paths(module))
    return [
        Layer(
            path=path,
            kind=type(parts[path]).__name__,
            time_ms=medians[path],
            time_share=medians[path] / whole if whole > 0 else None,
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
    with contextlib.redirect_stdout(sys.stderr), evaluation_mode(module), self_cost(module, _clock_ms(module)) as own:
        module(*args, **kwargs)
        end = time.perf_counter() + seconds
        for call in range(MAX_CALLS):
            if call >= MIN_CALLS and time.perf_counter() >= end:
                break
            own.clear()
            module(*args, **kwargs)
            for path, spent in own.items():
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
