"""Detection of layers called in a Python loop, which an export unrolls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from omgoptim.errors import argument
from omgoptim.models.samples import forward_args, repeat_to_size

if TYPE_CHECKING:
    from omgoptim.operations.loaded_model import LoadedModel
    from omgoptim.requests import QuantizeRequest

UNROLLED_CALLS = 16
"""Calls of one layer per forward pass that count as a loop; shared heads and blocks have fewer."""


def unrolled_note(loaded: LoadedModel, request: QuantizeRequest) -> str | None:
    """Return a note on a layer called in a loop, its cost and alternatives; None where there is none."""
    if loaded.module is None:
        return None
    counts = layer_calls(loaded.module, loaded)
    path, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if most < UNROLLED_CALLS:
        return None
    layer = loaded.module.get_submodule(path)
    library = {nn.LSTMCell: "nn.LSTM", nn.GRUCell: "nn.GRU", nn.RNNCell: "nn.RNN"}.get(type(layer))
    library_note = f"; {library} over the whole sequence is exported as one operator" if library else ""
    dynamic = f"; cheaper, without calibration: the same call with {argument('scheme', 'dynamic')}"
    cheaper = "" if request.scheme.scheme == "dynamic" else dynamic
    total = sum(counts.values())
    return (
        f"'{path}' ({type(layer).__name__}) is called {most} times in one forward: the export writes out {total:,} "
        f"layer calls for {len(counts)} layers, so that export, calibration and conversion of each candidate take "
        f"about {total / len(counts):.0f} times as long as for the layers alone{library_note}{cheaper}"
    )


def layer_calls(module: nn.Module, loaded: LoadedModel) -> dict[str, int]:
    """Count the calls of each layer with parameters in one forward pass on one sample."""
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
