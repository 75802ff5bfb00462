"""Equalization groups: tensors whose channels can be scaled together without changing the outputs.

A channel can be divided by a positive factor where it is written and multiplied by it where it is read, if every
operator between commutes with the scaling: op(x / s) = op(x) / s, channel by channel. A tensor with any other writer or
reader, inputs and outputs of the program among them, excludes its whole group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx import ModelProto, NodeProto, numpy_helper

from omgoptim.models.onnx_file import attribute, initializers
from omgoptim.techniques.quantize._onnx.layer_weights import LayerWeight

HOMOGENEOUS = {"Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Abs", "Neg"}
"""Ops on the elements of their first input with op(s x) = s op(x) for s > 0."""

SPATIAL = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Upsample"}
"""Homogeneous operators that mix positions (the axes after the channels of axis 1)."""

CHANNEL = 1
"""Axis of the channels of a convolution's tensors and of a matrix (batch, channels)."""


@dataclass(slots=True)
class EqualizationGroup:
    """Tensors that share a factor per channel, the layers that write them and those that read them."""

    tensors: list[str] = field(default_factory=list)
    axis: int = CHANNEL
    """Axis of the channels: `CHANNEL`, or -1 where MatMul writes and reads the last."""
    writers: list[LayerWeight] = field(default_factory=list)
    readers: list[LayerWeight] = field(default_factory=list)
    addends: list[str] = field(default_factory=list)
    """Constants that are added to a tensor of the group, one value a channel."""
    clips: list[NodeProto] = field(default_factory=list)
    """Clip(0, upper), which commutes only while `upper` is never reached: then it is a Relu."""

    @property
    def depthwise(self) -> bool:
        """True if every reader is depthwise: a scale per channel takes any factor."""
        return all(reader.read().shape[2] == 1 for reader in self.readers)


def find_groups(model: ModelProto, weighted: Sequence[LayerWeight]) -> list[EqualizationGroup]:
    """Find the equalization groups of a program."""
    finder = _Finder(model, weighted)
    for node in model.graph.node:
        finder.visit(node)
    return finder.groups()


class _Finder:
    """Union-find over tensor names."""

    def __init__(self, model: ModelProto, weighted: Sequence[LayerWeight]):
        self.layers = {layer.name: layer for layer in weighted}
        self.constants = initializers(model)
        self.shapes = _shapes(model)
        self.reads = Counter(name for node in model.graph.node for name in node.input)
        self.parent: dict[str, str] = {}
        self.refused = {value.name for value in (*model.graph.input, *model.graph.output)}
        self.written: list[tuple[str, LayerWeight]] = []
        self.read: list[tuple[str, LayerWeight]] = []
        self.added: list[tuple[str, str]] = []
        self.clipped: list[tuple[str, NodeProto]] = []
        self.axes: dict[str, set[int]] = {}

    def root(self, name: str) -> str:
        self.parent.setdefault(name, name)
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def visit(self, node: NodeProto) -> None:
        layer = self.layers.get(node.name)
        if layer is not None:
            axis = -1 if node.op_type == "MatMul" else CHANNEL
            self.written.append((node.output[0], layer))
            self.read.append((node.input[0], layer))
            for name in (node.output[0], node.input[0]):
                self.axes.setdefault(self.root(name), set()).add(axis)
            if node.op_type == "Gemm":  # its bias is an addend when it is not a vector of its own
                self.refused.update(name for name in node.input[2:] if name not in self.constants)
            return
        if not self._joins(node):
            self.refused.update(name for name in (*node.input, *node.output) if name)

    def _joins(self, node: NodeProto) -> bool:
        """Join the tensors that a node scales alike; False if it is no such node."""
        out = node.output[0]
        if node.op_type == "Clip" and self._clips_from_zero(node):
            self.clipped.append((out, node))
            return self._join([node.input[0], out])
        if node.op_type in HOMOGENEOUS:
            return self._join([node.input[0], out])
        if node.op_type in SPATIAL or self._is_spatial(node) or self._drops_ones(node) or self._pads_zeros(node):
            return self._join([node.input[0], out], axis=CHANNEL)
        if node.op_type == "Add":
            constant = [name for name in node.input if name in self.constants]
            if not constant:
                same = len({self._channels(name) for name in (*node.input, out)}) == 1
                return same and self._channels(out) is not None and self._join([*node.input, out], axis=CHANNEL)
            return len(constant) == 1 and self._adds_bias(node, constant[0])
        return False

    def _adds_bias(self, node: NodeProto, constant: str) -> bool:
        """Join the operands of a MatMul's bias addition, if the bias is a vector of the last axis with one reader."""
        (value,), out = [name for name in node.input if name != constant], node.output[0]
        dims, shape = self.constants[constant].dims, self.shapes.get(out)
        if self.reads[constant] != 1 or not shape or list(dims) != [shape[-1]]:
            return False
        self.added.append((out, constant))
        return self._join([value, out], axis=-1)

    def _join(self, names: Sequence[str], axis: int | None = None) -> bool:
        first, *others = (self.root(name) for name in names)
        merged = self.axes.setdefault(first, set())
        if axis is not None:
            merged.add(axis)
        for other in others:
            if other != self.root(first):
                self.parent[other] = self.root(first)
                self.axes.setdefault(self.root(first), set()).update(self.axes.pop(other, set()))
        return True

    def groups(self) -> list[EqualizationGroup]:
        refused = {self.root(name) for name in self.refused if name not in self.constants}
        found: dict[str, EqualizationGroup] = {}
        for name in list(self.parent):
            if self.root(name) not in refused:
                found.setdefault(self.root(name), EqualizationGroup()).tensors.append(name)
        for name, layer in self.written:
            if self.root(name) in found:
                found[self.root(name)].writers.append(layer)
        for name, layer in self.read:
            if self.root(name) in found:
                found[self.root(name)].readers.append(layer)
        for name, addend in self.added:
            if self.root(name) in found:
                found[self.root(name)].addends.append(addend)
        for name, clip in self.clipped:
            if self.root(name) in found:
                found[self.root(name)].clips.append(clip)
        kept = []
        for root, group in found.items():
            axes = self.axes.get(root, set())
            group.axis = -1 if axes == {-1} else CHANNEL
            ranks_agree = axes != {-1, CHANNEL} or all(len(self.shapes.get(n) or ()) == 2 for n in group.tensors)
            if ranks_agree and group.writers and group.readers and _channels_agree(group):
                kept.append(group)
        return kept

    def _channels(self, name: str) -> int | None:
        shape = self.shapes.get(name)
        return shape[CHANNEL] if shape is not None and len(shape) in (2, 4) else None

    def _clips_from_zero(self, node: NodeProto) -> bool:
        low = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        return low is not None and float(numpy_helper.to_array(low)) == 0

    def _is_spatial(self, node: NodeProto) -> bool:
        """Return whether a node reduces all axes after the channels."""
        if node.op_type not in ("ReduceMean", "ReduceMax", "ReduceSum"):
            return False
        axes = attribute(node, "axes", None)
        if axes is None and len(node.input) > 1 and node.input[1] in self.constants:
            axes = numpy_helper.to_array(self.constants[node.input[1]]).reshape(-1).tolist()
        shape = self.shapes.get(node.input[0])
        return shape is not None and axes is not None and all(axis % len(shape) > CHANNEL for axis in axes)

    def _drops_ones(self, node: NodeProto) -> bool:
        """Return whether a node reshapes (N, C, 1, 1) to (N, C)."""
        before, after = self.shapes.get(node.input[0]), self.shapes.get(node.output[0])
        if node.op_type not in ("Flatten", "Reshape", "Squeeze") or before is None or after is None:
            return False
        return len(after) == 2 and before[CHANNEL] == after[CHANNEL] is not None and set(before[2:]) <= {1}

    def _pads_zeros(self, node: NodeProto) -> bool:
        if node.op_type != "Pad":
            return False
        if attribute(node, "mode", b"constant") != b"constant" or len(node.input) < 3 or not node.input[2]:
            return True
        fill = self.constants.get(node.input[2])
        return fill is not None and not numpy_helper.to_array(fill).any()


def _channels_agree(group: EqualizationGroup) -> bool:
    written = {layer.read().shape[0] * layer.read().shape[1] for layer in group.writers}
    read = {layer.read().shape[0] * layer.read().shape[2] for layer in group.readers}
    return len(written | read) == 1


def _shapes(model: ModelProto) -> Mapping[str, list[int | None]]:
    shapes = {}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    return shapes
