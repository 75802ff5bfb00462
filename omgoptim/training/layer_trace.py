"""Trace of a module's layer outputs: all shapes in one forward, or the values of some within a block.

Both use forward hooks that are removed afterwards, also on an error; the module is not changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

from omgoptim.errors import DataError
from omgoptim.models.forward import attached
from omgoptim.runtimes.signature import Signature
from omgoptim.training.losses import main_output
from omgoptim.training.modes import device_of, eval_mode

Side = Literal["output", "input"]

FUSED = ("in_proj", "qkv", "c_attn", "Wqkv", "query_key_value", "qkv_proj")
"""Names of fused layers that compute all three at once."""


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """Traced output of a layer for one batch."""

    path: str
    layer: str
    """Class of the layer."""
    shape: tuple[int, ...]
    """Shape, the batch first."""
    axis: int
    """Axis of the channels: 1, as convolutions have it, or the last."""
    final: bool
    """It is the module's main output itself."""
    leaf: bool
    """It is a leaf module with parameters."""
    block: bool
    """It is a container of layers."""

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[self.axis]

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the position axes: (height, width) of a map, (length) of a sequence, () of a vector."""
        return self.shape[1:-1] if self.axis == -1 else self.shape[2:]

    @property
    def sequence(self) -> bool:
        """Return whether positions are tokens or time steps, with the channels last."""
        return len(self.shape) == 3 and self.axis == -1


@dataclass(frozen=True, slots=True)
class Trace:
    """Traced outputs of the layers of a module, in order of execution."""

    layers: list[LayerOutput]
    head: str | None
    """Linear layer whose output is the main output, if there is one."""
    output: tuple[int, ...]
    """Shape of the main output."""
    fused: str | None
    """Last layer that computes queries, keys and values in one, if there is one."""

    @property
    def by_path(self) -> dict[str, LayerOutput]:
        """Outputs by the path of their layer."""
        return {layer.path: layer for layer in self.layers}


@dataclass(slots=True)
class _Tracing:
    """Records of the forward hooks."""

    batch: int
    layers: dict[str, LayerOutput] = field(default_factory=dict)
    width: int = 0
    """Channel count of the last layer with parameters."""
    first: bool = False
    """The last layer has its channels on axis 1."""
    outputs: dict[str, weakref.ref[Tensor]] = field(default_factory=dict)
    """Weak references to the outputs, by which the main output is identified."""

    def record(self, path: str, layer: nn.Module, output: Any) -> None:
        block = any(True for _ in layer.children())
        leaf = not block and any(True for _ in layer.parameters(recurse=False))
        if leaf and (found := _width(layer)) is not None:
            self.width, self.first = found
        tensor = _tensor(output)
        if tensor is None or tensor.ndim < 2 or len(tensor) != self.batch or not tensor.is_floating_point():
            return
        self.layers.pop(path, None)  # called again: where the last call was
        shape, axis = tuple(tensor.shape), self._axis(tensor)
        self.layers[path] = LayerOutput(path, type(layer).__name__, shape, axis, final=False, leaf=leaf, block=block)
        self.outputs[path] = weakref.ref(tensor)

    def _axis(self, output: Tensor) -> int:
        """Return the channel axis of an output.

        It is that of the last layer where the sizes agree, else the usual one for the number of dimensions.
        """
        if output.ndim == 2:
            return -1
        usual = [1, -1] if self.first else [-1, 1]
        fitting = [axis for axis in usual if output.shape[axis] == self.width]
        return fitting[0] if fitting else (1 if output.ndim > 3 else usual[0])


def trace(module: nn.Module, signature: Signature, inputs: Mapping[str, Tensor]) -> Trace:
    """Run a module once in eval mode, without gradients, and record each layer's output.

    Layers without a tensor whose first dimension is the batch are left out.

    Args:
        module: in any mode, which is restored.
        signature: how it is called.
        inputs: one batch by input name; moved to where the module is.

    Raises:
        DataError: the module returns no tensor with a batch dimension.
    """
    device = device_of(module)
    tracing = _Tracing(len(next(iter(inputs.values()))))
    args, kwargs = signature.to_call({name: tensor.to(device) for name, tensor in inputs.items()})
    hooks = (
        layer.register_forward_hook(lambda layer, _args, output, path=path: tracing.record(path, layer, output))
        for path, layer in module.named_modules()
    )
    with attached(hooks), eval_mode(module, device), torch.no_grad():
        outputs = main_output(module(*args, **kwargs))
    final = {path for path, reference in tracing.outputs.items() if reference() is outputs}
    head = next((path for path in final if isinstance(module.get_submodule(path), nn.Linear)), None)
    layers = [replace(layer, final=layer.path in final or not layer.path) for layer in tracing.layers.values()]
    return Trace(layers, head, tuple(outputs.shape), _fused(module))


@contextmanager
def capture_outputs(module: nn.Module, places: Iterable[tuple[str, Side]]) -> Iterator[dict[tuple[str, Side], Tensor]]:
    """Capture inputs or outputs of layers in a module's last forward within the block, by path and side.

    The captured tensors keep their gradient; outputs are copied, since later layers may work in place.
    """
    captured: dict[tuple[str, Side], Tensor] = {}

    def capture(path: str, side: Side, value: Any) -> None:
        tensor = _tensor(value)
        if tensor is None:
            raise DataError(f"layer '{path}' returns no tensor", f"it returned a {type(value).__name__}")
        captured[path, side] = tensor.clone()

    def watched(path: str, side: Side) -> RemovableHandle:
        layer = module.get_submodule(path)
        if side == "output":
            return layer.register_forward_hook(lambda _m, _args, out: capture(path, "output", out))
        return layer.register_forward_pre_hook(
            lambda _m, args, kwargs: capture(path, "input", (args, kwargs)), with_kwargs=True
        )

    with attached(watched(path, side) for path, side in dict.fromkeys(places)):
        yield captured


def _tensor(value: Any) -> Tensor | None:
    try:
        return main_output(value)
    except DataError:
        return None


def _width(layer: nn.Module) -> tuple[int, bool] | None:
    """Return a layer's output channels, and whether they are on axis 1; None where that is unknown."""
    if isinstance(layer, _ConvNd):
        return layer.out_channels, True
    if isinstance(layer, (_BatchNorm, _InstanceNorm)):
        return layer.num_features, True
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, True
    if isinstance(layer, nn.Linear):
        return layer.out_features, False
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1], False
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, False
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional), False
    return None


def _fused(module: nn.Module) -> str | None:
    """Return the path of the last layer that computes queries, keys and values in one."""
    last = None
    for path, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            last = f"{path}.in_proj_weight" if path else "in_proj_weight"
        elif path.rpartition(".")[2] in FUSED:
            last = path
    return last
