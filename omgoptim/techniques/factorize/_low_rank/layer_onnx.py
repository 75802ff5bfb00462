"""Export of a single layer or block to ONNX, for timing it on an engine that runs programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 18, 8
"""ONNX opset that every supported ONNX Runtime and OpenVINO can read."""

INPUT, OUTPUT = "x", "output"


def write_program(layers: Sequence[nn.Module], shape: Sequence[int], path: Path) -> Path:
    """Write an ONNX file of Linear layers or of convolutions, one after the other, with their weights.

    Args:
        layers: nn.Linear or nn.Conv2d, float32 or written as such.
        shape: of the first one's input.
        path: the file to write.
    """
    from onnx import TensorProto, helper, numpy_helper, save_model

    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    name = INPUT
    for index, layer in enumerate(layers):
        assert isinstance(layer, (nn.Linear, nn.Conv2d))  # what blocks are made of
        weight = layer.weight.detach().float().cpu()
        names = [f"weight_{index}"]
        tensors.append(numpy_helper.from_array((weight.mT if weight.dim() == 2 else weight).numpy().copy(), names[0]))
        if layer.bias is not None:
            names.append(f"bias_{index}")
            tensors.append(numpy_helper.from_array(layer.bias.detach().float().cpu().numpy(), names[1]))
        output = OUTPUT if index == len(layers) - 1 else f"between_{index}"
        nodes += (
            _conv(layer, [name, *names], output) if isinstance(layer, nn.Conv2d) else _linear([name, *names], output)
        )
        name = output
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, None)],
        tensors,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    save_model(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), str(path))
    return path


def _linear(inputs: list[str], output: str) -> list[onnx.NodeProto]:
    from onnx import helper

    if len(inputs) == 2:
        return [helper.make_node("MatMul", inputs, [output])]
    product = f"{output}_product"
    return [
        helper.make_node("MatMul", inputs[:2], [product]),
        helper.make_node("Add", [product, inputs[2]], [output]),
    ]


def _conv(layer: nn.Conv2d, inputs: list[str], output: str) -> list[onnx.NodeProto]:
    from onnx import helper

    left, right, above, below = layer._reversed_padding_repeated_twice
    how = {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "dilations": list(layer.dilation),
        "pads": [above, left, below, right],
        "group": layer.groups,
    }
    return [helper.make_node("Conv", inputs, [output], **how)]
