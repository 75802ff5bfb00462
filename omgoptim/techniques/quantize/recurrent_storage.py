"""Store the weights of recurrent layers in int8 behind a Cast and a Mul. Registers no technique.

ONNX Runtime and OpenVINO have no int8 GRU or RNN. Both compute Cast and Mul of constants once, when they open the
file, and then run the float layer that they know, at its float speed: a quarter of the bytes on disk, nothing lost in
time. (DequantizeLinear would stay in the graph: ONNX Runtime does not fold it.)

    s = max |w| / 127 over a row of a direction's weight,   w = Cast(q) * s
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from omgoptim.models.onnx_graph import Layer
from omgoptim.techniques.quantize.embeddings import quantize_rows

RECURRENT = ("GRU", "LSTM", "RNN")

STORED = "int8 weight on disk, computed in float"
"""What such a layer is then, for people."""


def store_recurrent(model: ModelProto, chosen: Sequence[Layer], per_row: bool = True) -> None:
    """Rewrite the chosen recurrent layers in place: every float32 weight (D, gates * H, K) that they read.

    Biases and initial states stay; a weight that several layers share is stored once. Layers whose weights are no
    stored tensors are left, and so are layers inside of a loop's body.
    """
    wanted = {layer.node for layer in chosen if layer.op in RECURRENT}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    read = [name for node in model.graph.node if node.name in wanted for name in node.input[1:3]]
    added: list[NodeProto] = []
    for name in dict.fromkeys(read):
        tensor = tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 3:
            continue
        values, scales = quantize_rows(numpy_helper.to_array(tensor), per_row)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(numpy_helper.from_array(values, f"{name}_gates_quantized"))
        model.graph.initializer.append(numpy_helper.from_array(scales, f"{name}_gates_scale"))
        stem = f"{name}_gates"
        added += [
            helper.make_node("Cast", [f"{stem}_quantized"], [f"{stem}_float"], f"{stem}_cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{stem}_float", f"{stem}_scale"], [name], f"{stem}_mul"),
        ]
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*added, *nodes])
