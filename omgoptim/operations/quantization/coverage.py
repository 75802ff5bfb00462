"""Quantization coverage: stored precision before and after, and compute precision, of every layer.

Read from the float program (or module), the artifact's files and the process that measured it. The technique's own
report is used only for the reasons of skipped layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from omgoptim.errors import OmgoptimError
from omgoptim.measure.engine_profile import compute_dtypes, query_kernels
from omgoptim.measure.launch import LATENCY
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.program_macs import count_program
from omgoptim.measure.size import StoredWeights, module_layers, saved_layers, stored_layers
from omgoptim.models.manifest import LOWERED, PROGRAM, Manifest
from omgoptim.models.onnx_file import load
from omgoptim.models.output_check import read_check
from omgoptim.models.pte_file import lowered_layers
from omgoptim.reports import Coverage, LayerPrecision, Skip
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.engine import Kernel
from omgoptim.runtimes.onnxruntime import KEEP_FLOAT_LAYERS
from omgoptim.techniques.quantize._onnx.program import REPLACED_SUFFIXES
from omgoptim.text import plural

if TYPE_CHECKING:
    from torch import nn

INTEGER_SCHEMES = ("static", "dynamic", "qat")
"""Schemes for integer arithmetic; the others store in fewer bits and compute in float."""

LOOKUPS = ("Gather", "Embedding", "EmbeddingBag")
"""Lookup operators, without arithmetic."""

STORED_ONLY = ("GRU", "RNN")
"""Operators without integer kernels in any engine here; their int8 is storage only."""

MIN_INTEGER_SHARE = 0.5
"""Minimum share of the changed layers' multiply-accumulates in integers for the verdict REAL: the majority."""

NAMED_LAYERS = 3
"""Number of layers that a sentence names, to keep it short."""


@dataclass(frozen=True, slots=True)
class FloatModel:
    """The model before quantization, as a program, a module or both."""

    program: Path | None
    module: nn.Module | None
    precision: str = "float32"
    """Original precision, of which program and module may be a float32 copy."""
    macs: Mapping[str, int] = field(default_factory=dict)
    """Multiply-accumulates of the module's layers by path; a program's are counted here."""


@dataclass(frozen=True, slots=True)
class _LayerPair:
    before: StoredWeights
    after: StoredWeights
    computed_in: str | None


def read_kernels(process: MeasuringProcess) -> list[Kernel]:
    """Return the kernels that the engine reports; empty where it reports none or fails to."""
    try:
        return query_kernels(process, LATENCY)
    except OmgoptimError:
        return []


def measure_coverage(
    before: FloatModel, artifact: Path, scheme: str, skipped: Sequence[Skip], kernels: Sequence[Kernel]
) -> Coverage | None:
    """Measure the quantization coverage of every layer with weights.

    Args:
        before: the model before quantization.
        artifact: the artifact's folder.
        scheme: name of the technique: `fp32` quantizes nothing, and has no coverage.
        skipped: layers that the technique left alone, with its reasons.
        kernels: what the engine that measured the artifact runs, from `read_kernels`.

    Returns:
        The coverage; None where the scheme quantizes nothing or the float model is missing.
    """
    runtime = Manifest.read(artifact).runtime
    runs = ENGINES[runtime].runs
    if scheme == "fp32":
        return None
    work = before.macs
    if runs == "lowered" and before.module is not None:
        pairs = _lowered_pairs(before.module, artifact / LOWERED)
    elif runs == "module" and before.module is not None:
        pairs = _module_pairs(before.module, artifact, kernels)
    elif runs == "program" and before.program is not None:
        pairs = _program_pairs(before.program, artifact / PROGRAM, kernels)
        work = _program_work(before.program, artifact, pairs)
    else:
        return None
    pairs = [replace(pair, before=_in_original_precision(pair.before, before.precision)) for pair in pairs]
    reasons = {skip.path: skip.reason for skip in skipped}
    return _coverage([_record(pair, reasons) for pair in pairs], _weight_share(pairs), scheme, runtime, work)


def _program_work(program: Path, artifact: Path, pairs: Sequence[_LayerPair]) -> dict[str, int]:
    """Return multiply-accumulates of one sample by path; empty where they cannot be counted."""
    sample = {name: array[:1] for name, array in read_check(artifact).batch.items()}
    by_node = count_program(program, sample).by_node
    return (
        {pair.before.path: sum(by_node.get(node, 0) for node in pair.before.nodes) for pair in pairs} if by_node else {}
    )


def _in_original_precision(layer: StoredWeights, precision: str) -> StoredWeights:
    """Return a layer of a float32 copy with the dtype and bytes of the original."""
    if precision == "float32" or layer.dtype != "float32" or not _bits(precision):
        return layer
    tensors = {name: size * _bits(precision) // 32 for name, size in layer.tensors.items()}
    return replace(layer, dtype=precision, tensors=tensors)


def coverage_warnings(coverage: Coverage | None, runtime: str) -> list[str]:
    """Return a warning where weights are stored as integers and computed in float."""
    if coverage is None or coverage.verdict != "SIMULATED":
        return []
    floating = [one for one in _computing(coverage.layers) if one.computed_in != "int8"]
    other = "openvino" if runtime == "onnxruntime" else "onnxruntime"
    kinds = sorted({one.op_after for one in floating if one.op_after in STORED_ONLY})
    advice = (
        f"no engine here computes {' or '.join(kinds)} in integers"
        if all(one.op_after in STORED_ONLY for one in floating)
        else f"try runtime {other}, or scheme static with another algorithm (onnxruntime or nncf)"
    )
    return [
        f"int8 is simulated: {runtime} computes {plural(len(floating), 'quantized layer')} in "
        f"{_dtype_list(floating)} ({_names(floating)}), so the artifact is smaller but hardly faster; {advice}"
    ]


def activation_range_warnings(scheme: str, batch: int) -> list[str]:
    """Return a warning where activations are quantized with the range of a whole batch of evaluation samples."""
    if scheme != "dynamic" or batch < 2:
        return []
    return [
        "dynamic int8 takes the range of activations over a whole batch: outputs for a sample depend slightly on the "
        f"others, and the quality is that of batches of {batch}"
    ]


def float_layer_warnings(artifact: Path) -> list[str]:
    """Return a warning where the file needs a session option, for those who open it without omgoptim."""
    manifest = Manifest.read(artifact)
    if manifest.runtime != "onnxruntime" or not manifest.mixed_precision:
        return []
    option = ", ".join(f'"{word}"' for word in KEEP_FLOAT_LAYERS)
    return [
        "layers in float between quantized ones: ONNX Runtime quantizes them as well when it opens model.onnx, unless "
        f"the session has add_session_config_entry({option}), as in this measurement and in omgoptim.open_artifact"
    ]


def _program_pairs(source: Path, program: Path, kernels: Sequence[Kernel]) -> list[_LayerPair]:
    before = stored_layers(load(source, weights=False))
    written = load(program, weights=False)
    after = stored_layers(written)
    by_node = {node: layer for layer in after for node in layer.nodes}
    by_path = {layer.path: layer for layer in after}
    numbers = compute_dtypes(kernels, written, by_node.keys())
    pairs = []
    for layer in before:
        renamed = (node + suffix for node in layer.nodes for suffix in ("", *REPLACED_SUFFIXES))
        found = [by_node[name] for name in renamed if name in by_node] or [by_path.get(layer.path, layer)]
        now = replace(found[0], tensors={name: size for one in found for name, size in one.tensors.items()})
        computed = {numbers[node] for one in found for node in one.nodes if node in numbers}
        pairs.append(_LayerPair(layer, now, _computed_in(now, computed)))
    return pairs


def _computed_in(layer: StoredWeights, dtypes: Collection[str]) -> str | None:
    """Return the compute dtype, float over int8 where nodes differ; looked-up rows are dequantized first."""
    number = max(dtypes, key=lambda one: one != "int8", default=None)
    return "float32" if number == "int8" and layer.op == "Gather" else number


def _module_pairs(module: nn.Module, artifact: Path, kernels: Sequence[Kernel]) -> list[_LayerPair]:
    before = module_layers(module)
    after = {layer.path: layer for layer in saved_layers(artifact, before)}
    numbers = {kernel.name: kernel.computed_in for kernel in kernels}
    return [_LayerPair(layer, after.get(layer.path, layer), numbers.get(layer.path)) for layer in before]


def _lowered_pairs(module: nn.Module, program: Path) -> list[_LayerPair]:
    """Pair the layers of a module with those of the program's delegates; a portable kernel computes the others."""
    after = {layer.path: layer for layer in lowered_layers(program)}
    pairs = []
    for before in module_layers(module):
        found = after.get(before.path)
        stored = found is not None and found.dtype != before.dtype
        now = replace(before, dtype=found.dtype, tensors={before.path: found.bytes}) if found and stored else before
        pairs.append(_LayerPair(before, now, found.computed_in if found else None))
    return pairs


def _record(pair: _LayerPair, reasons: Mapping[str, str]) -> LayerPrecision:
    before, after = pair.before, pair.after
    record = LayerPrecision(
        path=before.path,
        op=before.op,
        op_after=after.op,
        shape=list(before.shape),
        dtype=before.dtype,
        dtype_after=after.dtype,
        bytes=before.bytes,
        bytes_after=after.bytes,
        computed_in=pair.computed_in,
    )
    if _is_changed(record):
        return record
    return record.model_copy(update={"reason": reasons.get(before.path, "its weights are stored unchanged")})


def _weight_share(pairs: Sequence[_LayerPair]) -> float:
    """Return the share of weight bytes stored in fewer bits; shared weights count once."""
    every = {name: size for pair in pairs for name, size in pair.before.tensors.items()}
    fewer = {
        name: size
        for pair in pairs
        if _bits(pair.after.dtype) < _bits(pair.before.dtype)
        for name, size in pair.before.tensors.items()
    }
    return sum(fewer.values()) / sum(every.values()) if every else 0.0


def _coverage(
    layers: list[LayerPrecision], share: float, scheme: str, runtime: str, work: Mapping[str, int]
) -> Coverage:
    changed = [one for one in layers if _is_changed(one)]
    known = [one for one in changed if one.computed_in is not None]
    integer = [one for one in known if one.computed_in == "int8"]
    verdict = _verdict(changed, scheme, work)
    return Coverage(
        verdict=verdict,
        why=_why(verdict, changed, len(layers), share, runtime),
        changed=len(changed),
        total=len(layers),
        integer=len(integer) if known else None,
        weight_share=share,
        layers=layers,
    )


def _verdict(
    changed: Sequence[LayerPrecision], scheme: str, work: Mapping[str, int]
) -> Literal["REAL", "SIMULATED", "NO-OP"]:
    """Return the verdict, weighted by multiply-accumulates, or bytes where those were not counted."""
    if not changed:
        return "NO-OP"
    computing = _computing(changed)
    costs = {one.path: work.get(one.path, 0) if any(work.values()) else one.bytes for one in computing}
    integer = sum(costs[one.path] for one in computing if one.computed_in == "int8")
    if scheme in INTEGER_SCHEMES and integer < MIN_INTEGER_SHARE * sum(costs.values()):
        return "SIMULATED"
    return "REAL"


def _computing(layers: Sequence[LayerPrecision]) -> list[LayerPrecision]:
    """Return the changed layers with arithmetic whose compute dtype the engine reports."""
    return [one for one in layers if _is_changed(one) and one.computed_in is not None and one.op_after not in LOOKUPS]


def _why(verdict: str, changed: Sequence[LayerPrecision], total: int, share: float, runtime: str) -> str:
    """Return a sentence: `20 of 21 layers in int8, 99 % of the weight bytes; 20 computed in integers by …`."""
    if verdict == "NO-OP":
        return f"none of {plural(total, 'layer')} is stored in fewer bits."
    kinds = " and ".join(sorted({one.dtype_after.removeprefix("u") for one in changed}))
    stored = f"{len(changed)} of {plural(total, 'layer')} in {kinds}, {_percent(share)} of the weight bytes"
    known = [one for one in changed if one.computed_in is not None]
    if not known:
        return f"{stored}; {runtime} does not report their compute precision."
    integer = [one for one in known if one.computed_in == "int8"]
    floating = [one for one in known if one.computed_in != "int8"]
    if not integer:
        numbers = _dtype_list(floating)
        if numbers == kinds:
            return f"{stored}; {runtime} computes them in {numbers}."
        only = "but only in storage" if verdict == "SIMULATED" else "in storage"
        return f"{stored}, {only}: {runtime} computes them in {numbers}."
    rest = f", {plural(len(floating), 'layer')} in {_dtype_list(floating)} ({_names(floating)})" if floating else ""
    return f"{stored}; {len(integer)} computed in integers by {runtime}{rest}."


def _is_changed(layer: LayerPrecision) -> bool:
    return _bits(layer.dtype_after) < _bits(layer.dtype)


def _bits(dtype: str) -> int:
    """Return the bits of a dtype: the first number in `uint8`, `bfloat16` or `float8e4m3fn`."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0


def _dtype_list(layers: Sequence[LayerPrecision]) -> str:
    return " and ".join(sorted({one.computed_in for one in layers if one.computed_in is not None}))


def _names(layers: Sequence[LayerPrecision]) -> str:
    return ", ".join(
        [one.path or "the model itself" for one in layers[:NAMED_LAYERS]] + ["…"] * (len(layers) > NAMED_LAYERS)
    )


def _percent(share: float) -> str:
    """Format a share; one below 1 is never rounded up to 100 %."""
    return "all" if share >= 1 else f"{min(99.9, 100 * share):.3g} %"
