"""Which half of int8 costs what, and how fast a file is: parts of `lite_net.py`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

from omgoptim.errors import OmgoptimError
from omgoptim.hardware import usable_cores
from omgoptim.measure.launch import LATENCY, THROUGHPUT
from omgoptim.measure.measuring_process import TimingSetup
from omgoptim.measure.timing import PLANS, time_artifacts
from omgoptim.models import artifact as artifacts
from omgoptim.models.manifest import Manifest
from omgoptim.models.onnx_file import load
from omgoptim.models.output_check import OutputCheck
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import Signature
from omgoptim.techniques.quantize._onnx import preparation
from omgoptim.techniques.quantize._onnx.preparation import at_opset
from omgoptim.techniques.quantize._onnx.qdq import nodes_by_name, stored_weights
from omgoptim.techniques.quantize._ptq.calibration import ActivationReader


def weights_only(quantized: Path) -> ModelProto:
    """A QDQ program whose activations are clipped to their ranges and not rounded."""
    model = onnx.load(str(quantized))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    clips: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in stored:
            scale, zero = (stored[name].reshape(-1) for name in node.input[1:3])
            info, along = np.iinfo(zero.dtype), (-1, 1, 1) if scale.size > 1 else ()  # one for each channel of a map
            ends = [f"{node.output[0]}_{end}" for end in ("low", "high")]
            for name, integer in zip(ends, (info.min, info.max), strict=True):
                value = ((integer - zero.astype(np.int64)) * scale).astype(np.float32).reshape(along)
                model.graph.initializer.append(numpy_helper.from_array(value, name))
            floored, clips[node.output[0]] = f"{node.output[0]}_floored", f"{node.output[0]}_clipped"
            nodes.append(helper.make_node("Max", [node.input[0], ends[0]], [floored]))
            nodes.append(helper.make_node("Min", [floored, ends[1]], [clips[node.output[0]]]))
        elif node.op_type == "DequantizeLinear" and node.input[0] in clips:
            nodes.append(helper.make_node("Identity", [clips[node.input[0]]], [node.output[0]]))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def activations_only(quantized: Path, source: Path) -> ModelProto:
    """A QDQ program, made of `source` by plain ranges, with its float weights."""
    model = onnx.load(str(quantized))
    with tempfile.TemporaryDirectory() as scratch:
        prepared = preparation.prepare(at_opset(load(source), 13), Path(scratch))
    floats = {tensor.name: tensor for tensor in prepared.graph.initializer}
    nodes, known = nodes_by_name(prepared), {tensor.name for tensor in model.graph.initializer}
    integers = stored_weights(model)
    for node in model.graph.node:
        if node.name in integers:
            weight = nodes[node.name].input[1]
            if weight not in known:
                model.graph.initializer.append(floats[weight])
                known.add(weight)
            node.input[1] = weight
    return model


def simulated(model: ModelProto, images: NDArray[Any]) -> NDArray[Any]:
    """Scores of a program of one input, every node run as it is written."""
    watch, name = ActivationReader(model, exact=True, threads=usable_cores()), model.graph.input[0].name
    parts = [watch.run({name: images[start : start + 50]}) for start in range(0, len(images), 50)]
    return np.concatenate([next(iter(part.values())) for part in parts])


def speeds(files: Mapping[str, Path], signature: Signature, images: NDArray[Any]) -> dict[str, dict[str, float]]:
    """How many times faster than the first each file is on ONNX Runtime, in one race."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        example = {signature.inputs[0].name: images[:2]}
        for name, path in files.items():
            outputs = ENGINES["onnxruntime"].open(path, signature, SessionSettings(usable_cores())).run(example)
            manifest = Manifest("onnxruntime", "int8", signature)
            artifacts.save_program(folder / name, path, manifest, OutputCheck(example, outputs))
        batches = {}
        for name, count in ((LATENCY, 1), (THROUGHPUT, 16)):
            batches[name] = folder / f"{name}.npz"
            np.savez(batches[name], **{signature.inputs[0].name: images[:count]})
        bench = TimingSetup(batches=batches, batch=16, threads=usable_cores(), cwd=Path(os.getcwd()))
        timings = time_artifacts([folder / name for name in files], bench, PLANS["standard"], 0)
    found = {}
    for name, timing in zip(files, timings, strict=True):
        if isinstance(timing, OmgoptimError):
            raise SystemExit(f"{name} could not be timed: {timing}")
        ratio = timing.speedup
        found[name] = {"latency_ms_p50": timing.latency_ms_p50}
        if ratio is not None:
            found[name] |= {"speedup": ratio.value, "low": ratio.low, "high": ratio.high}
    return found
