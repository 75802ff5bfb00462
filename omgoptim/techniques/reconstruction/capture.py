"""Hooks on the layers of one forward, and its early end after the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from omgoptim.measure.self_time import evaluation_mode

Hook = Callable[[nn.Module, Any, Any], None]
"""`hook(layer, input, output)`: the layer's first argument, and its output, which is None before the call."""


class StopForward(BaseException):
    """Raised by a hook to end a forward; a BaseException, so that no `except Exception` of a model's code takes it."""


@contextmanager
def forward_hooks(module: nn.Module, hooks: Mapping[str, Hook], *, before: bool = False) -> Iterator[None]:
    """Call hooks with the inputs and outputs of layers for as long as the context is open.

    Args:
        module: holds the layers.
        hooks: path of a layer to its hook.
        before: call them before the layers run instead of after.
    """

    def adapted(hook: Hook) -> Callable[..., None]:
        def act(layer: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            hook(layer, args[0] if args else next(iter(kwargs.values())), output)

        return act

    handles = []
    try:
        for path, hook in hooks.items():
            layer = module.get_submodule(path)
            register = layer.register_forward_pre_hook if before else layer.register_forward_hook
            handles.append(register(adapted(hook), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_until_stopped(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run a module in eval mode, without gradients, until it ends or a hook raises `StopForward`."""
    try:
        with evaluation_mode(module):
            module(*args, **kwargs)
    except StopForward:
        pass
