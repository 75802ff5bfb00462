"""Sparsity masks that keep pruned weights at zero while the others are trained."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError


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
                raise TechniqueError(f"the module has no layer and no parameter '{path}' whose zeros could be held")
            chosen |= {id(weight): weight for weight in found}
        return ZeroMasks([(weight, weight.detach() == 0) for weight in chosen.values()])

    def hold(self) -> None:
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

    def kept(self, weight: Tensor) -> Tensor | None:
        """Return where this parameter is free (True), of its shape; None where it has no mask."""
        return next((~zero for held, zero in self._zeros if held is weight and bool(zero.any())), None)

    def _on_their_devices(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the pairs, each mask on its parameter's present device."""
        self._zeros = [(weight, zero.to(weight.device)) for weight, zero in self._zeros]
        return self._zeros
