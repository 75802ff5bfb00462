"""Quantize weights and activations to int8, ranges read from calibration data: convolutions and Linear.

What it does: runs the float program on calibration samples, reads each activation's range, and puts QuantizeLinear /
DequantizeLinear pairs around the layers, from which an engine makes integer kernels. q = round(x / s) + z with
s = (max - min) / 255 for activations; weights have s = max|w| / 127 over an output channel and no zero point.
Before that the float program is rewritten to keep the accuracy: cross-layer equalization, ranges selected by output
SQNR, bias correction, rounding of small kernels (effort best: AdaRound on all weights); up to three first layers stay
in float where they have under 4 % of the work and made most of the noise. `_ptq/state.py` says which effort does
what, `_ptq/pipeline.py` in which order and when a step is kept.
Two algorithms write the program: ONNX Runtime's writer with all of the above, and NNCF with scaled channels, its own
ranges and bias correction, and for transformers its SmoothQuant and mixed preset; `auto` tries both.
Use when: convolution nets, and Linear where dynamic quantization costs too much time. Needs some 100-300 samples.
What you really get: storage and memory about a quarter; the most speed on a CPU with VNNI, in ONNX
Runtime and OpenVINO alike; effort changes neither. NNCF's transformer program is fast in OpenVINO only.
Limits: LSTM and GRU stay float (scheme dynamic); networks with attention are refused by algorithm onnxruntime, since
plain ranges over all of their ops destroy the outputs, and their channels are not scaled. What follows the last layers
stays float where it joins tensors of very different ranges, such as boxes and scores. A Clip whose upper bound no
calibration sample comes near is taken for a ReLU when channels are scaled. Embeddings are stored in int8 and computed
in float.
Source: arXiv:1712.05877, arXiv:1906.04721, arXiv:2004.10568, onnxruntime.quantization and nncf.quantize; differs in
per-channel weights by default, in steps that are kept only if held-out calibration samples gain, in embeddings (scale
per row with algorithm onnxruntime), and in proving from the written program what changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnx import ModelProto

from omgoptim.errors import NoLayerChanged, TechniqueError
from omgoptim.models.onnx_file import is_large, load
from omgoptim.models.onnx_graph import OnnxLayer, find_layers, has_attention, module_paths, select_layers
from omgoptim.reports import Skip
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._onnx import preparation
from omgoptim.techniques.quantize._onnx.embeddings import quantize_embeddings
from omgoptim.techniques.quantize._onnx.preparation import at_opset
from omgoptim.techniques.quantize._onnx.program import finish, no_layer_left, outcome
from omgoptim.techniques.quantize._ptq import backends, pipeline
from omgoptim.techniques.quantize._ptq.calibration import Batch, batches_for
from omgoptim.techniques.quantize._ptq.state import PtqTask, apply_preset
from omgoptim.techniques.registry import Outcome, ProgramRun, technique

KEPT_IN_FLOAT = "first layer, kept in float: it is cheap, and in int8 it adds most of the quantization noise"
RECURRENT_REASON = "static quantization does not support recurrent layers; "
REASONS = {
    "LSTM": RECURRENT_REASON + "scheme dynamic quantizes an LSTM",
    "GRU": RECURRENT_REASON + "scheme dynamic stores a GRU's weights in int8 and computes in float",
    "RNN": RECURRENT_REASON + "scheme dynamic stores an RNN's weights in int8 and computes in float",
}


def variants(params: Static, source: Path) -> list[Static]:
    """Resolve algorithm `auto` to the installed algorithms worth trying on the program `source`.

    For a graph with attention that is NNCF alone, even if it is missing: its error names the install line.
    """
    if params.algorithm != "auto":
        return [params]
    if has_attention(load(source, weights=False)):
        return [params.model_copy(update={"algorithm": "nncf"})]
    onnxruntime = [params.model_copy(update={"algorithm": "onnxruntime"})]
    return [*onnxruntime, params.model_copy(update={"algorithm": "nncf"})] if backends.has_nncf() else onnxruntime


@technique(Static, runtimes=("onnxruntime", "openvino"), needs_data=True, source="arXiv:1712.05877")
def apply(source: Path, target: Path, params: Static, run: ProgramRun) -> Outcome:
    """Read the float program `source`, write the quantized one to `target`. `auto` is the first of `variants`.

    Raises:
        DataError: no calibration data, or none that can be used.
        SetupError: algorithm nncf without nncf.
        TechniqueError: this network is none for the algorithm, or nothing in it can be quantized.
    """
    params = apply_preset(params, "balanced")  # what nobody left open any more stays
    original = load(source)
    algorithm = variants(params, source)[0].algorithm
    if algorithm == "onnxruntime" and has_attention(original):
        raise TechniqueError(
            "static quantization with algorithm onnxruntime destroys the outputs of networks with attention",
            "it quantizes every operator per tensor, also attention masks with their very large constants",
            "use algorithm nncf, or scheme dynamic",
        )
    batches = batches_for(original, run, params.calibration_samples)
    float_layers: list[OnnxLayer] = []
    with tempfile.TemporaryDirectory(dir=run.scratch) as scratch:
        folder = Path(scratch)
        model = at_opset(load(source), 13)  # the first with a scale per channel
        if algorithm == "onnxruntime":
            model = preparation.prepare(model, folder)
        before = find_layers(model, module_paths(original))
        chosen = [layer for layer in select_layers(before, params.targets, params.ignore) if not layer.is_quantized]
        if nothing := no_layer_left("static quantization", before, chosen):
            raise nothing
        if algorithm == "onnxruntime":
            quantized, notes = backends.quantize_by_onnxruntime(
                model,
                batches,
                PtqTask(chosen, params, run.threads, run.seed, run.progress, run.cache),
                folder,
                float_layers,
            )
            quantize_embeddings(quantized, chosen, params.granularity == "per_channel", params.embedding_bits)
        else:
            model, equalization_notes = _equalized(model, chosen, batches, params, run)
            own_embeddings = params.embedding_bits == 4  # NNCF has no embeddings in 4 bits
            layers = [layer for layer in chosen if not own_embeddings or layer.op != "Gather"]
            quantized, notes = backends.quantize_by_nncf(model, layers, batches, params, folder)
            if own_embeddings:
                quantize_embeddings(quantized, chosen, per_row=True, num_bits=4)
            notes = [*equalization_notes, *notes]
    result = changes(before, chosen, quantized, params, float_layers)
    finish(quantized, original, target)
    return replace(result, notes=notes)


def changes(
    before: Sequence[OnnxLayer],
    chosen: Sequence[OnnxLayer],
    quantized: ModelProto,
    params: Static,
    float_layers: Sequence[OnnxLayer] = (),
) -> Outcome:
    """Return the changed and skipped layers of a written program.

    Args:
        before: all layers of the float program.
        chosen: those that were to be quantized.
        quantized: the written program.
        params: of the technique.
        float_layers: layers that were left in float for what int8 would lose there.

    Raises:
        NoLayerChanged: nothing.
    """
    activations = "int8" if params.symmetric else "uint8"
    precision = f"int8 weight {params.granularity.replace('_', ' ')}, {activations} activations"
    result = outcome(before, chosen, quantized, REASONS, precision)
    if not result.changed:
        why = "; ".join(sorted({skip.reason for skip in result.skipped}))
        fix = "use scheme dynamic or bf16"
        raise NoLayerChanged("static quantization changed no layer", why, fix, schemes=["dynamic", "bf16"])
    paths = {layer.path for layer in float_layers}
    skipped = [
        Skip(path=skip.path, reason=KEPT_IN_FLOAT, kind="no_benefit") if skip.path in paths else skip
        for skip in result.skipped
    ]
    return replace(result, skipped=skipped)


def _equalized(
    model: ModelProto, chosen: Sequence[OnnxLayer], batches: Sequence[Batch], params: Static, run: ProgramRun
) -> tuple[ModelProto, list[str]]:
    """Equalize the float program for another quantizer, where that is requested and supported."""
    if not params.equalize or has_attention(model) or is_large(model):
        return model, []
    try:
        shaped = preparation.infer_shapes(model)
        return pipeline.equalize(shaped, batches, PtqTask(chosen, params, run.threads, progress=run.progress))
    except TechniqueError as error:  # ONNX Runtime, by which it is judged, cannot quantize this program
        return model, [f"Cross-layer equalization was left out: {error.what}."]
