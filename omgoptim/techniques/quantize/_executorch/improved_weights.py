"""Weights of the PTQ pipeline in an exported module: equalized, rounded and bias-corrected on its ONNX program.

The pipeline (`_ptq/pipeline.py`) rewrites the float ONNX program of the same module, in which a layer is found by its
module path. Its weights and biases are copied from there. That both compute the same is checked on the weights before
the pipeline.
"""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from omgoptim.models.globs import is_selected
from omgoptim.models.onnx_file import initializers, load
from omgoptim.models.onnx_graph import OnnxLayer, find_layers, module_paths
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx.layer_weights import LayerWeight, bias_of, find_layer_weights
from omgoptim.techniques.quantize._onnx.preparation import prepare_with_shapes
from omgoptim.techniques.quantize._ptq import pipeline
from omgoptim.techniques.quantize._ptq.calibration import Batch
from omgoptim.techniques.quantize._ptq.state import PtqTask
from omgoptim.techniques.registry import ProgramRun

if TYPE_CHECKING:
    from torch import fx

LAYERS = ("aten.conv", "aten.linear")
"""Beginnings of the names of operators with a weight and a bias."""

CLIPS = ("aten.relu6", "aten.hardtanh", "aten.clamp")
"""Beginnings of the names of operators that a Clip stands for."""


def improve_weights(
    module: fx.GraphModule, program: Path, batches: Sequence[Batch], params: Static, run: ProgramRun
) -> tuple[fx.GraphModule, fx.GraphModule, list[str]] | None:
    """Return two copies of the module, with the weights before and after the pipeline, and layers to keep in float.

    Args:
        module: exported, in float.
        program: the float ONNX program of the same module.
        batches: calibration inputs by name.
        params: resolved, see `_ptq/state.py`.
        run: threads, seed and progress.

    Returns:
        The module with batch norms folded, which must still compute the same; the improved module; and module paths.
        None where a layer of the program is not one of the module's.

    Raises:
        TechniqueError: ONNX Runtime cannot quantize the program.
    """
    original = load(program)
    paths = module_paths(original)
    with tempfile.TemporaryDirectory(dir=run.scratch) as scratch:
        prepared = prepare_with_shapes(original, Path(scratch))
    layers = find_layers(prepared, paths)
    chosen = [layer for layer in layers if is_selected([layer.path], params.targets, params.ignore)]
    task = PtqTask(chosen, params, run.threads, run.seed, run.progress)
    rewritten, in_float = pipeline.rewrite(prepared, batches, task)
    before, after = copy.deepcopy(module), copy.deepcopy(module)
    if not _copy_weights(before, prepared, layers) or not _copy_weights(after, rewritten, layers):
        return None
    return (
        (before, after, [layer.path for layer in in_float])
        if _replace_clips_by_relus(after, prepared, rewritten, paths)
        else None
    )


def module_path(node: fx.Node) -> str:
    """Return the path of the module that a node comes from, empty for the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _copy_weights(module: fx.GraphModule, program: ModelProto, layers: Sequence[OnnxLayer]) -> bool:
    """Copy weights and biases of a program, in place, and drop batch norms after them: the program has them folded.

    False where a layer's path has no operator or several.
    """
    path_of = {layer.node: layer.path for layer in layers}
    nodes = _nodes_by_path(module, LAYERS)
    for layer in find_layer_weights(program, layers):
        found = nodes.get(path_of[layer.name], [])
        if len(found) != 1:
            return False
        stored = numpy_helper.to_array(layer.weight)
        matrix = layer.node.op_type in ("Gemm", "MatMul")
        weight = stored.T if matrix and not layer.transposed else stored
        if tuple(weight.shape) != tuple(_argument(found[0], 1).meta["val"].shape):
            return False
        _set_argument(module, found[0], 1, weight)
        bias = _bias(program, layer)
        if bias is not None and (bias.any() or _argument(found[0], 2) is not None):
            _set_argument(module, found[0], 2, bias)
        _drop_batch_norm(found[0])
    module.graph.eliminate_dead_code()
    module.recompile()
    return True


def _bias(program: ModelProto, layer: LayerWeight) -> NDArray[np.float32] | None:
    """Return the bias of a layer; of a MatMul that is the constant that is added to its output."""
    if layer.node.op_type != "MatMul":
        return bias_of(program, layer)
    constants = initializers(program)
    for node in program.graph.node:
        if node.op_type == "Add" and layer.node.output[0] in node.input:
            added = [numpy_helper.to_array(constants[name]) for name in node.input if name in constants]
            return np.asarray(added[0]) if added and added[0].shape == (layer.read().shape[1],) else None
    return None


def _drop_batch_norm(node: fx.Node) -> None:
    users = list(node.users)
    if len(users) == 1 and "batch_norm" in str(users[0].target):
        users[0].replace_all_uses_with(node)


def _replace_clips_by_relus(
    module: fx.GraphModule, prepared: ModelProto, rewritten: ModelProto, paths: Mapping[str, str]
) -> bool:
    """Replace clips by ReLUs where equalization did, in place; False where it is not known which they are."""
    import torch

    after = {node.name: node.op_type for node in rewritten.graph.node}
    opened: dict[str, list[bool]] = defaultdict(list)
    for node in prepared.graph.node:
        if node.op_type == "Clip":
            path = next((paths[name] for name in (node.name, *node.output) if name in paths), "")
            opened[path].append(after[node.name] == "Relu")
    nodes = _nodes_by_path(module, CLIPS)
    for path, each in opened.items():
        if not any(each):
            continue
        if not all(each) or len(nodes.get(path, [])) != len(each):
            return False
        for clip in nodes[path]:
            clip.target, clip.args, clip.kwargs = torch.ops.aten.relu.default, clip.args[:1], {}
    module.recompile()
    return True


def _nodes_by_path(module: fx.GraphModule, names: tuple[str, ...]) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(names):
            found[module_path(node)].append(node)
    return found


def _argument(node: fx.Node, index: int) -> Any:
    return node.args[index] if len(node.args) > index else None


def _set_argument(module: fx.GraphModule, node: fx.Node, index: int, value: NDArray[Any]) -> None:
    """Give an operator a stored tensor of its own as an argument, in place."""
    import torch

    name = f"_improved_{node.name}_{index}"
    tensor = torch.nn.Parameter(torch.from_numpy(np.array(value, np.float32)), requires_grad=False)
    module.register_parameter(name, tensor)
    old = _argument(node, index)
    with module.graph.inserting_before(node):
        stored = module.graph.get_attr(name)
    stored.meta = dict(old.meta) if old is not None else {"val": tensor}
    arguments = list(node.args) + [None] * (index + 1 - len(node.args))
    arguments[index] = stored
    node.args = tuple(arguments)
