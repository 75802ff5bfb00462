"""Diagnostics of the graph: mask fills, gates and unfolded batch norms, known to be hard on int8.

Sources: swish and squeeze-excite, arXiv:2004.09602 (section 5); masks, `static.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from omgoptim.models.onnx_graph import constant_roots
from omgoptim.techniques.quantize._diagnostics.layer_statistics import Quantizable

HUGE = 1e4
"""Magnitude above which a constant is taken for the fill value of a mask."""

MAX_PATHS = 8
"""Maximum number of layers that a diagnostic lists."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Known cause of int8 quantization error, found in a program."""

    name: str
    paths: list[str]
    """Affected layers, the worst first."""
    evidence: str
    fix: str
    nodes: list[str] = field(default_factory=list)
    """Layers to keep in float to undo it."""
    undo: dict[str, Any] = field(default_factory=dict)
    """Parameters of the technique that undo it; comes before `nodes`."""


def mask_fills(model: ModelProto) -> Iterator[Diagnostic]:
    """Find constants that dwarf all other values, such as the fill value of an attention mask."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    roots = constant_roots(model.graph)
    values: dict[str, float] = {}
    for node in model.graph.node:
        if node.op_type not in ("Add", "Sub", "Mul", "Where", "Max", "Min", "Expand", "ConstantOfShape"):
            continue
        for root in {root for name in node.input for root in roots.get(name, ())} & stored.keys():
            array = numpy_helper.to_array(stored[root])
            if np.issubdtype(array.dtype, np.floating) and array.size:
                largest = float(np.abs(array.astype(np.float64)).max())
                if largest >= HUGE:
                    values[node.name] = max(largest, values.get(node.name, 0.0))
    if values:
        worst = sorted(values, key=lambda name: -values[name])
        yield Diagnostic(
            "mask fill",
            worst[:MAX_PATHS],
            f"{worst[0]} takes a constant of {values[worst[0]]:.3g}: a range that holds it has no level left for "
            "anything else",
            "a small fill such as -100 in the model, or algorithm nncf, which leaves masks in float",
        )


def gates(model: ModelProto, layers: Sequence[Quantizable]) -> Iterator[Diagnostic]:
    """Find hard-swish and squeeze-excite: products of a value and its own gate."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    by_node = {item.layer.node: item for item in layers}
    swishes: list[str] = []
    excited: list[str] = []
    for node in graph.node:
        swish = node.op_type == "HardSwish"
        for name in node.input if node.op_type == "Mul" else ():
            gate = producers.get(name)
            if gate is None or gate.op_type not in ("Sigmoid", "HardSigmoid", "Clip", "Div"):
                continue
            behind = _behind(gate, producers)
            if any(one.op_type in ("GlobalAveragePool", "ReduceMean") for one in behind):
                excited += [one.name for one in behind if one.name in by_node and one.name not in excited]
            elif set(node.input) & set(behind[-1].input) or set(node.input) & set(gate.input):
                swish = swish or gate.op_type != "Div" or any(one.op_type == "Clip" for one in behind)
        if swish:
            swishes.append(node.name)
    if swishes:
        yield Diagnostic(
            "hard-swish",
            swishes[:MAX_PATHS],
            f"{len(swishes)} activations multiply a value by its own gate: a small negative lobe shares the range of "
            "large positive values, and each is rounded several times",
            "ReLU where the model can be trained again, or scheme qat",
        )
    if excited:
        yield Diagnostic(
            "squeeze-excite",
            [by_node[name].layer.path for name in excited][:MAX_PATHS],
            f"{len(excited)} layers compute gates that scale whole channels, so that their rounding is multiplied",
            "these layers in float: they are few bytes and little time",
            excited,
        )


def _behind(gate: NodeProto, producers: Mapping[str, NodeProto], most: int = 12) -> list[NodeProto]:
    """Return the chain of nodes before a gate, up to the pooling of a squeeze-excite block."""
    chain, node = [gate], gate
    for _ in range(most):
        before = next((producers[name] for name in node.input if name in producers), None)
        if before is None:
            break
        chain.append(before)
        if before.op_type in ("GlobalAveragePool", "ReduceMean"):
            break
        node = before
    return chain


def unfolded_norms(model: ModelProto) -> Iterator[Diagnostic]:
    left = [node.name for node in model.graph.node if node.op_type == "BatchNormalization"]
    if left:
        yield Diagnostic(
            "unfolded batch norm",
            left[:MAX_PATHS],
            f"{len(left)} batch norms could not be merged into the layer before them: each is computed in float "
            "between two conversions",
            "put each norm right after a convolution or Linear that nothing else reads",
        )
