"""Self cost of each module, without its children, for counters and timers.

A cost is any monotone counter that can be read at any moment: a clock, a counter of operations.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import nn

ROOT = "(model)"
"""Path of the model itself: the work that its own forward does outside its children."""


def module_paths(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module once for every module; one that is used in several places has its first path."""
    return ((path or ROOT, part) for path, part in module.named_modules())


@contextlib.contextmanager
def self_cost(module: nn.Module, read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Charge the growth of `read()` to the module whose forward is running, while the context is open.

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
