"""One layer at another width: as a module for torch, as a program of one node for the other engines.

The weights are random: no kernel that is timed here looks at their values, as long as they are no denormals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.prune._channels.layer_widths import is_depthwise

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 18, 8
"""ONNX opset that every supported ONNX Runtime and OpenVINO can read."""

INPUT, OUTPUT = "x", "output"

KINDS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
"""Classes of layers that can be timed by themselves."""

TimedLayer = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.Linear

_CONVOLUTIONS: tuple[type[_ConvNd], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True, slots=True)
class SizedLayer:
    """A layer of given sizes on an input of a given shape; equal ones take equal time."""

    layer: TimedLayer
    shape: tuple[int, ...]
    """Shape of the whole layer's input; its features are replaced by `inside`."""
    inside: int
    outside: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        if isinstance(self.layer, nn.Linear):
            return (*self.shape[:-1], self.inside)
        return (*self.shape[: -self.spatial - 1], self.inside, *self.shape[-self.spatial :])

    @property
    def spatial(self) -> int:
        return 0 if isinstance(self.layer, nn.Linear) else len(self.layer.kernel_size)

    @property
    def groups(self) -> int:
        """Return the convolution groups at these sizes: as many as channels if depthwise, else unchanged."""
        if isinstance(self.layer, nn.Linear):
            return 1
        return self.inside if is_depthwise(self.layer) else self.layer.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Return the weight's shape in torch's layout."""
        if isinstance(self.layer, nn.Linear):
            return (self.outside, self.inside)
        if isinstance(self.layer, _ConvTransposeNd):
            return (self.inside, self.outside // self.groups, *self.layer.kernel_size)
        return (self.outside, self.inside // self.groups, *self.layer.kernel_size)

    @property
    def key(self) -> tuple[Any, ...]:
        """Return a key that is equal for layers of equal time."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            how: tuple[Any, ...] = ("linear",)
        else:
            transposed = isinstance(layer, _ConvTransposeNd)
            how = (transposed, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding)
            how += (self.groups,)
        return (*how, layer.bias is not None, str(layer.weight.dtype), self.input_shape, self.outside)


def sides(layer: TimedLayer) -> tuple[int, int]:
    """Return the input and output features of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def fits(layer: TimedLayer, inside: int, outside: int) -> bool:
    """Return whether a layer can have these sizes: its convolution groups must divide both."""
    if isinstance(layer, nn.Linear) or layer.groups == 1:
        return True
    groups = inside if is_depthwise(layer) else layer.groups
    return inside % groups == 0 and outside % groups == 0


def as_module(sized: SizedLayer, device: str, seed: int) -> nn.Module:
    """Create a module of that size, in eval mode."""
    layer, bias = sized.layer, sized.layer.bias is not None
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            fresh: nn.Module = nn.Linear(sized.inside, sized.outside, bias=bias)
        else:
            how: dict[str, Any] = {
                "stride": layer.stride,
                "padding": layer.padding,
                "dilation": layer.dilation,
                "groups": sized.groups,
                "bias": bias,
            }
            if isinstance(layer, _ConvTransposeNd):
                how["output_padding"] = layer.output_padding
            kind: Any = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))  # a subclass may do more
            fresh = kind(sized.inside, sized.outside, layer.kernel_size, **how)
    fresh = fresh.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_(generator=generator)
    return fresh.to(device=device, dtype=layer.weight.dtype).eval().requires_grad_(False)


def write_program(sized: SizedLayer, path: Path, seed: int) -> Path:
    """Write an ONNX file of the layer alone: Conv, ConvTranspose, Gemm, or MatMul and Add above two dimensions."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    weight = random.standard_normal(sized.weight_shape, dtype=np.float32)
    bias = None if sized.layer.bias is None else random.standard_normal(sized.outside, dtype=np.float32)
    nodes, weight = _nodes(sized, weight)
    tensors = [numpy_helper.from_array(weight, "weight")]
    if bias is not None:
        tensors.append(numpy_helper.from_array(bias, "bias"))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, sized.input_shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, None)],
        tensors,
    )
    return save(graph, path)


def write_empty_program(path: Path) -> Path:
    """Write an ONNX file with a trivial operator: the overhead of a call."""
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, (1, 1))
    result = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, (1, 1))
    return save(helper.make_graph([helper.make_node("Relu", [INPUT], [OUTPUT])], "empty", [value], [result]), path)


def save(graph: onnx.GraphProto, path: Path) -> Path:
    """Write a graph as a model of `OPSET`."""
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString())
    return path


def signature_of(shape: Sequence[int], dtype: str = "float32") -> Signature:
    """Return the signature of a single layer."""
    return Signature((InputTensor(INPUT, dtype, tuple(shape), False),), "tensor")


def _nodes(sized: SizedLayer, weight: NDArray[np.float32]) -> tuple[list[onnx.NodeProto], NDArray[np.float32]]:
    """Return the nodes, and the weight in their layout."""
    from onnx import helper

    layer = sized.layer
    inputs = [INPUT, "weight"] + (["bias"] if layer.bias is not None else [])
    if isinstance(layer, nn.Linear):
        if len(sized.input_shape) == 2:
            return [helper.make_node("Gemm", inputs, [OUTPUT], transB=1)], weight
        product = [helper.make_node("MatMul", inputs[:2], [OUTPUT if layer.bias is None else "product"])]
        if layer.bias is not None:
            product.append(helper.make_node("Add", ["product", "bias"], [OUTPUT]))
        return product, np.ascontiguousarray(weight.T)
    reversed_pads = layer._reversed_padding_repeated_twice  # last dimension first, begin and end of each
    how: dict[str, Any] = {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "dilations": layer.dilation,
        "group": sized.groups,
        "pads": [*reversed_pads[-2::-2], *reversed_pads[::-2]],
    }
    if isinstance(layer, _ConvTransposeNd):
        return [helper.make_node("ConvTranspose", inputs, [OUTPUT], output_padding=layer.output_padding, **how)], weight
    return [helper.make_node("Conv", inputs, [OUTPUT], **how)], weight
