"""Quantization-aware training: weights that were trained with int8 simulated, then quantized statically.

What it does: rounds weights and layer inputs to int8 in every forward of a short training (`training/
fake_quantization.py`), starting from ranges read on calibration data, with channels scaled as conversion will scale
them; batch normalization is frozen after a third of the steps, ranges after two. What is left is a plain float module
and the ranges it was trained with: its program is quantized with those, and with ranges of its own where none were
simulated. Each epoch is evaluated on the converted program, and compared with static quantization (effort balanced) of
the weights before training: on the selection samples the result is never worse.
Use when: static quantization loses more than the guard allows and there is training data; it costs a few epochs.
Without labels, or with distill, it learns from the float model's outputs.
What you really get: what static quantization gives, at the same size and speed; only the weights are better ones.
Limits: those of static quantization. What is added or concatenated between layers, attention's own products, LSTM and
GRU are not simulated; networks with attention are converted with ranges of their own (by nncf); with one scale per
weight, folding batch normalization changes what was simulated.
Source: arXiv:1712.05877; differs in freezing batch normalization instead of folding it while training, in scaled
channels, and in keeping the best converted checkpoint.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from omgoptim.models.onnx_file import is_large, load
from omgoptim.models.onnx_graph import find_layers, has_attention, module_paths, select_layers
from omgoptim.requests.quantize import Qat, Static
from omgoptim.techniques.quantize import static
from omgoptim.techniques.quantize._onnx.embeddings import quantize_embeddings
from omgoptim.techniques.quantize._onnx.preparation import prepare_with_shapes
from omgoptim.techniques.quantize._onnx.program import finish
from omgoptim.techniques.quantize._onnx.qdq import write_qdq
from omgoptim.techniques.quantize._ptq.calibration import batches_for
from omgoptim.techniques.quantize._ptq.observers import compute_ranges, observe_activations
from omgoptim.techniques.quantize._ptq.qat_state import (
    QatState,
    apply_trained_scaling,
    read_qat_state,
    with_trained_ranges,
)
from omgoptim.techniques.registry import Outcome, ProgramRun, technique


def static_of(params: Qat) -> Static:
    """Return the static quantization that training competes with: preset balanced, or fast for plain ranges."""
    return Static(
        granularity=params.granularity,
        symmetric=params.symmetric,
        embedding_bits=params.embedding_bits,
        range_method="auto" if params.equalize else "minmax",
        equalize=params.equalize,
        bias_correction=params.equalize,
        rounding="small_kernels" if params.equalize else "nearest",
        calibration_samples=params.calibration_samples,
        targets=params.targets,
        ignore=params.ignore,
    )


@technique(Qat, runtimes=("onnxruntime", "openvino"), needs_data=True, source="arXiv:1712.05877")
def apply(source: Path, target: Path, params: Qat, run: ProgramRun) -> Outcome:
    """Quantize the program of a trained module, `source`, and write it to `target`.

    A program that carries no QAT state was not trained: it is quantized as scheme static would.

    Raises:
        DataError, SetupError, TechniqueError: as static quantization does.
    """
    original = load(source)
    state = read_qat_state(original)
    if state is None or has_attention(original) or is_large(original):
        return static.apply(source, target, static_of(params), run)
    return _as_trained(source, target, params, state, run)


def _as_trained(source: Path, target: Path, params: Qat, state: QatState, run: ProgramRun) -> Outcome:
    """Equalize channels, take the trained ranges, observe the others, and write what training simulated."""
    original, static_params = load(source), static_of(params)
    batches = batches_for(original, run, params.calibration_samples)
    with tempfile.TemporaryDirectory(dir=run.scratch) as scratch:
        model = prepare_with_shapes(load(source), Path(scratch))
    before = find_layers(model, module_paths(original))
    chosen = select_layers(before, params.targets, params.ignore)
    model = apply_trained_scaling(model, chosen, static_params, state)
    observers = observe_activations(model, batches, histogram=False, threads=run.threads)
    ranges = with_trained_ranges(compute_ranges(observers, "minmax", params.symmetric), model, chosen, state)
    quantized = write_qdq(model, chosen, ranges, static_params)
    quantize_embeddings(quantized, chosen, params.granularity == "per_channel", params.embedding_bits)
    result = static.changes(before, chosen, quantized, static_params)
    finish(quantized, original, target)
    return result
