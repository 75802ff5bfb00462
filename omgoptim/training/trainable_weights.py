"""Trainable weights of a module: all, or low-rank adapters (LoRA) that are merged afterwards; masks of pruned weights.

Adapters save memory while training: gradients and optimizer state are those of the thin weights. They save nothing at
inference; merged in the weights' own precision, the module is the plain one it was, layer for layer and name for name.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from omgoptim.blocks.lora import LoRAConv, LoRALinear
from omgoptim.errors import RequestError, TechniqueError, argument

Kind = Literal["full", "lora", "none"]


@dataclass(slots=True)
class ZeroMasks:
    """Masks of the zero weights, by parameter object rather than name."""

    _zeros: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    @staticmethod
    def of(module: nn.Module, paths: Iterable[str]) -> ZeroMasks:
        """Create the masks of the zeros that weights have now.

        Args:
            module: not changed.
            paths: of layers (all their own weights of two or more dimensions) or of parameters.

        Raises:
            TechniqueError: a path is neither.
        """
        layers, parameters = dict(module.named_modules()), dict(module.named_parameters(remove_duplicate=False))
        chosen: dict[int, nn.Parameter] = {}
        for path in paths:
            if path in layers:
                found = [weight for weight in layers[path].parameters(recurse=False) if weight.ndim >= 2]
            elif path in parameters:
                found = [parameters[path]]
            else:
                raise TechniqueError(f"the module has no layer or parameter '{path}' to keep at zero")
            chosen |= {id(weight): weight for weight in found}
        return ZeroMasks([(weight, weight.detach() == 0) for weight in chosen.values()])

    def apply(self) -> None:
        """Set the masked weights to +0.0 again after an optimizer step, which ignores masks."""
        with torch.no_grad():
            for weight, zero in self._on_their_devices():
                weight.masked_fill_(zero, 0.0)

    def drop_gradients(self) -> None:
        """Set the gradients of masked weights to zero, for the gradient norm and the optimizer's state."""
        for weight, zero in self._on_their_devices():
            if weight.grad is not None:
                weight.grad.masked_fill_(zero, 0.0)

    def count(self) -> int:
        """Return how many weights are held at zero."""
        return sum(int(zero.sum()) for _, zero in self._zeros)

    def free_entries(self, weight: Tensor) -> Tensor | None:
        """Return where this parameter is free (True), of its shape; None where it has no mask."""
        return next((~zero for parameter, zero in self._zeros if parameter is weight and bool(zero.any())), None)

    def _on_their_devices(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the pairs, each mask on its parameter's present device."""
        self._zeros = [(weight, zero.to(weight.device)) for weight, zero in self._zeros]
        return self._zeros


@dataclass(frozen=True, slots=True)
class Adaptable:
    """Layers of a module that get adapters."""

    layers: dict[str, nn.Linear | _ConvNd]
    """Layers by path."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Path of every other layer with a weight, and why it gets no adapter."""


@contextmanager
def recovering(
    module: nn.Module,
    kind: Kind | str,
    rank: int = 8,
    alpha: float = 16.0,
    masks: ZeroMasks | None = None,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """Prepare a module for training within the block; merge its adapters at the end.

    `full` trains every weight that requires a gradient. `lora` freezes all weights, gives each Linear and convolution
    an adapter, and trains those and the weights and biases of normalization layers; at the end the adapters are merged,
    and the plain layers are back in their places. If the block raises, they are dropped instead. `none` freezes all. A
    model of transformers gets the adapters of PEFT where that is installed and no zeros have to be kept.

    Args:
        module: changed while the block runs.
        kind: full, lora or none.
        rank: of the adapters, cut to what a layer can have.
        alpha: the adapters' product is scaled by alpha / rank.
        masks: zeros that merged weights keep.
        seed: that the adapters are drawn from; the global random state is not touched.

    Raises:
        TechniqueError: `lora`, and no layer can have an adapter.
    """
    if kind not in ("full", "lora", "none"):
        raise RequestError(f"recover must be full, lora or none, not '{kind}'")
    if kind == "full":
        yield module
        return
    requires_grad_before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    restore: Callable[[bool], None] = lambda _merge: None  # noqa: E731
    succeeded = False
    try:
        restore = _adapt(module, rank, alpha, masks, seed) if kind == "lora" else _freeze(module)
        yield module
        succeeded = True
    finally:
        restore(succeeded)
        for parameter, requires_grad in requires_grad_before.items():
            parameter.requires_grad_(requires_grad)


def adaptable(module: nn.Module) -> Adaptable:
    """Return the layers that `lora` adapts: Linears and convolutions whose weight is trainable and not shared."""
    places = Counter(id(layer) for _, layer in module.named_modules(remove_duplicate=False))
    owners = Counter(
        id(weight)
        for layer in dict.fromkeys(module.modules())
        for weight in layer._parameters.values()
        if weight is not None
    )
    found = Adaptable({})
    for path, layer in module.named_modules():
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            continue
        reason = _not_adaptable(layer, owners, places)
        if reason is None:
            found.layers[path] = layer
        else:
            found.skipped[path] = reason
    return found


def _not_adaptable(layer: nn.Linear | _ConvNd, owners: Counter[int], places: Counter[int]) -> str | None:
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"{type(layer).__name__} is not called as a layer with one input"  # such as attention's out_proj
    if not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed from other parameters (a parametrization)"
    if not layer.weight.is_floating_point() or not layer.weight.requires_grad:
        return "its weight is frozen"
    if places[id(layer)] > 1 or owners[id(layer.weight)] > 1:
        return "its weight is shared with another layer"
    if isinstance(layer, _ConvNd) and layer.weight.shape[1] == 1 and layer.groups > 1:
        return "a depthwise convolution has too few weights for a LoRA adapter"
    return None


def _adapt(module: nn.Module, rank: int, alpha: float, masks: ZeroMasks | None, seed: int) -> Callable[[bool], None]:
    """Insert adapters; return the function that removes them, merged or not."""
    found = adaptable(module)
    if "" in found.layers:
        raise TechniqueError(
            "the model is one layer, which an adapter cannot replace", "", f"use {argument('recover', 'full')}"
        )
    if not found.layers:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(found.skipped.items())[:4])
        raise TechniqueError(
            "no layer of the model supports a LoRA adapter",
            reasons or "it has no Linear layer or convolution",
            f"use {argument('recover', 'full')}",
        )
    trained_before = {parameter for parameter in module.parameters() if parameter.requires_grad}
    _freeze(module)
    for layer in module.modules():
        if _is_normalization(layer):
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(parameter in trained_before)
    norms = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if masks is None and _is_pretrained(module) and importlib.util.find_spec("peft") is not None:
        restore = _adapt_with_peft(module, found, rank, alpha, seed)
    else:
        restore = _adapt_with_blocks(module, found, rank, alpha, masks, seed)
    for parameter in norms:  # PEFT freezes whatever is not its own
        parameter.requires_grad_(True)
    return restore


def _adapt_with_blocks(
    module: nn.Module, found: Adaptable, rank: int, alpha: float, masks: ZeroMasks | None, seed: int
) -> Callable[[bool], None]:
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, LoRALinear | LoRAConv] = {}
    for path, layer in found.layers.items():
        kept = masks.free_entries(layer.weight) if masks is not None else None
        if isinstance(layer, nn.Linear):
            adapters[path] = LoRALinear(layer, rank, alpha, kept, generator)
        else:
            adapters[path] = LoRAConv(layer, rank, alpha, kept, generator)
    for path, adapter in adapters.items():
        module.set_submodule(path, adapter)

    def restore(merge: bool) -> None:
        for path, adapter in adapters.items():
            module.set_submodule(path, adapter.merge() if merge else adapter.base)

    return restore


def _adapt_with_peft(module: nn.Module, found: Adaptable, rank: int, alpha: float, seed: int) -> Callable[[bool], None]:
    import peft

    attributes = set(vars(module))
    linears = [path for path, layer in found.layers.items() if isinstance(layer, nn.Linear)]
    other_layers = {path: layer for path, layer in found.layers.items() if path not in linears}
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="|".join(re.escape(path) for path in linears)
    )
    restore_others = None
    if linears:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, module)
    if other_layers:
        restore_others = _adapt_with_blocks(module, Adaptable(other_layers), rank, alpha, None, seed)

    def restore(merge: bool) -> None:
        if restore_others is not None:
            restore_others(merge)
        for path in linears:
            adapter: Any = module.get_submodule(path)
            if merge:
                adapter.merge()
            module.set_submodule(path, adapter.get_base_layer())
        for name in set(vars(module)) - attributes:
            delattr(module, name)

    return restore


def _freeze(module: nn.Module) -> Callable[[bool], None]:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return lambda _merge: None


def _is_normalization(layer: nn.Module) -> bool:
    """Return whether a layer is a normalization: torch's, or one named so, as LlamaRMSNorm or LayerNorm2d."""
    return isinstance(layer, (_NormBase, nn.LayerNorm, nn.GroupNorm)) or bool(
        re.search(r"(Norm|Norm\dd)$", type(layer).__name__)
    )


def _is_pretrained(module: nn.Module) -> bool:
    """Return whether a module is a transformers model, without importing transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)
