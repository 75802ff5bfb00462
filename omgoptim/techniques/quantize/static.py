"""Quantize weights and activations to int8, ranges read from calibration data: convolutions and Linear.

What it does: runs the float program on calibration samples, reads each activation's range, and puts QuantizeLinear /
DequantizeLinear pairs around the layers, from which an engine makes integer kernels. q = round(x / s) + z with
s = (max - min) / 255 for activations; weights have s = max|w| / 127 over an output channel and no zero point.
Two algorithms: ONNX Runtime's (the plain ranges, or a histogram's) and NNCF's (bias correction, and SmoothQuant with a
mixed preset for transformers); on small convolution nets now the one, now the other keeps more, so `auto` tries both.
Use when: convolution nets, and Linear where dynamic quantization costs too much time. Needs some 100-300 samples.
What you really get: storage and memory about a quarter; the most speed on a CPU with VNNI, in ONNX
Runtime and OpenVINO alike. NNCF's transformer program is fast in OpenVINO only.
Limits: LSTM and GRU stay float (scheme dynamic); networks with attention are refused by algorithm onnxruntime, since
plain ranges over all of their ops leave nothing of the output. Embeddings are
stored in int8 and computed in float.
Source: arXiv:1712.05877, onnxruntime.quantization.quantize_static and nncf.quantize; differs in per-channel weights by
default, in embeddings (scale per row with algorithm onnxruntime), and in proving from the written program what changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from omgoptim.errors import TechniqueError
from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import has_attention, layers, module_paths, select
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize import nncf_static, ort_static
from omgoptim.techniques.quantize.calibration import batches_for
from omgoptim.techniques.quantize.coverage import outcome
from omgoptim.techniques.quantize.embeddings import quantize_embeddings
from omgoptim.techniques.quantize.onnx_file import at_opset, finish
from omgoptim.techniques.registry import Outcome, ProgramRun, technique

RECURRENT_REASON = "its recurrence is not quantized from calibrated ranges; "
REASONS = {
    "LSTM": RECURRENT_REASON + "scheme dynamic quantizes an LSTM",
    "GRU": RECURRENT_REASON + "scheme dynamic with runtime torch_eager quantizes a GRU",
    "RNN": RECURRENT_REASON + "no engine here has an int8 RNN",
}


def variants(params: Static, source: Path) -> list[Static]:
    """The concrete algorithms worth trying on the program `source`, those that are installed.

    For a graph with attention that is NNCF alone, named even if it is missing, so that the install line is told.
    """
    if params.algorithm != "auto":
        return [params]
    if has_attention(load(source, weights=False)):
        return [params.model_copy(update={"algorithm": "nncf"})]
    plain = [params.model_copy(update={"algorithm": "onnxruntime"})]
    return [*plain, params.model_copy(update={"algorithm": "nncf"})] if nncf_static.is_installed() else plain


@technique(Static, runtimes=("onnxruntime", "openvino"), needs_data=True, source="arXiv:1712.05877")
def apply(source: Path, target: Path, params: Static, run: ProgramRun) -> Outcome:
    """Read the float program `source`, write the quantized one to `target`. `auto` is the first of `variants`.

    Raises:
        DataError: no calibration data, or none that can be used.
        SetupError: algorithm nncf without nncf.
        TechniqueError: this network is none for the algorithm, or nothing in it can be quantized.
    """
    original = load(source)
    algorithm = variants(params, source)[0].algorithm
    if algorithm == "onnxruntime" and has_attention(original):
        raise TechniqueError(
            "ONNX Runtime's static quantization ruins networks with attention",
            "plain ranges over all ops, the mask's huge constant among them, leave nothing of the output",
            "use algorithm nncf, or scheme dynamic",
        )
    batches = batches_for(original, run, params.calibration_samples)
    with tempfile.TemporaryDirectory(dir=run.scratch) as scratch:
        folder = Path(scratch)
        model = at_opset(load(source), 13)  # the first with a scale per channel
        if algorithm == "onnxruntime":
            model = ort_static.prepare(model, folder)
        before = layers(model, module_paths(original))
        chosen = [layer for layer in select(before, params.targets, params.ignore) if not layer.is_quantized]
        if not chosen:
            raise _nothing_to_do(bool(before), all(layer.is_quantized for layer in before))
        if algorithm == "onnxruntime":
            quantized = ort_static.quantize(model, chosen, batches, params, folder)
            quantize_embeddings(quantized, chosen, params.granularity == "per_channel")
        else:
            quantized = nncf_static.quantize(model, chosen, batches, params, folder)
        activations = "int8" if params.symmetric else "uint8"
        precision = f"int8 weight {params.granularity.replace('_', ' ')}, {activations} activations"
        result = outcome(before, chosen, quantized, REASONS, precision)
        if not result.changed:
            why = "; ".join(sorted({skip.reason for skip in result.skipped}))
            raise TechniqueError("static quantization changed no layer", why, "scheme dynamic, or scheme bf16")
        finish(quantized, original, target)
    return result


def _nothing_to_do(has_layers: bool, quantized: bool) -> TechniqueError:
    what = "static quantization would change no layer"
    if not has_layers:
        return TechniqueError(what, "the program has no layer with weights", "scheme fp32 tries other engines")
    if quantized:
        return TechniqueError(what, "the program is quantized already", "start from the float model")
    return TechniqueError(what, "targets and ignore leave no layer to quantize", "widen targets or narrow ignore")
