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
        """The zeros that weights have now.

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
        """Zero them again, as +0.0: after a step, whose momentum and decay know nothing of them."""
        with torch.no_grad():
            for weight, zero in self._on_their_devices():
                weight.masked_fill_(zero, 0.0)

    def drop_gradients(self) -> None:
        """Zero their gradients: what is gone counts neither in the gradient's norm nor in an optimizer's memory."""
        for weight, zero in self._on_their_devices():
            if weight.grad is not None:
                weight.grad.masked_fill_(zero, 0.0)

    def count(self) -> int:
        """How many weights are held at zero."""
        return sum(int(zero.sum()) for _, zero in self._zeros)

    def kept(self, weight: Tensor) -> Tensor | None:
        """Where this parameter is not held at zero (True: free), of its shape; None where it is not held at all."""
        return next((~zero for held, zero in self._zeros if held is weight and bool(zero.any())), None)

    def _on_their_devices(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The pairs, each mask moved to where its parameter is now."""
        self._zeros = [(weight, zero.to(weight.device)) for weight, zero in self._zeros]
        return self._zeros
