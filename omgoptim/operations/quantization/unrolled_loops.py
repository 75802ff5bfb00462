"""Layers that a Python loop of the forward calls again and again: an export writes every call out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from omgoptim.errors import argument
from omgoptim.models.samples import forward_args, repeat_to_size

if TYPE_CHECKING:
    from omgoptim.operations.loaded_model import LoadedModel
    from omgoptim.requests import QuantizeRequest

MANY_CALLS = 16
"""Calls of one layer in one forward from which on it is called unrolled: shared heads and blocks are below."""


def unrolled_note(loaded: LoadedModel, request: QuantizeRequest) -> str | None:
    """Say which layer a loop calls many times, what that costs, and the cheaper call; None where there is none."""
    if loaded.module is None:
        return None
    counts = layer_calls(loaded.module, loaded)
    path, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if most < MANY_CALLS:
        return None
    layer = loaded.module.get_submodule(path)
    library = {nn.LSTMCell: "nn.LSTM", nn.GRUCell: "nn.GRU", nn.RNNCell: "nn.RNN"}.get(type(layer))
    instead = f"; {library} over the whole sequence in its place is exported as one operator" if library else ""
    dynamic = f"; cheaper, without calibration: the same call with {argument('scheme', 'dynamic')}"
    cheaper = "" if request.scheme.scheme == "dynamic" else dynamic
    total = sum(counts.values())
    return (
        f"'{path}' ({type(layer).__name__}) is called {most} times in one forward: the export writes out {total:,} "
        f"layer calls for {len(counts)} layers, so that export, calibration and conversion of each candidate take "
        f"about {total / len(counts):.0f} times as long as for the layers alone{instead}{cheaper}"
    )


def layer_calls(module: nn.Module, loaded: LoadedModel) -> dict[str, int]:
    """How often one forward on one sample calls each layer that has parameters of its own."""
    counts: dict[str, int] = {}

    def count(path: str) -> None:
        counts[path] = counts.get(path, 0) + 1

    hooks = [
        layer.register_forward_pre_hook(lambda _module, _args, path=path: count(path))
        for path, layer in module.named_modules()
        if layer._parameters and path
    ]
    args, kwargs = forward_args(loaded.signature, repeat_to_size(loaded.evaluation, 1))
    try:
        with torch.inference_mode():
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts
