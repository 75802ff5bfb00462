"""Proof of what a quantization changed: what was stored, what is stored now, and what the engine computes it in.

Read off the float program (or module) and the artifact's own files, and asked of the process that measured the
artifact; what the technique says of itself is only used for the reasons of layers that it left alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from omgoptim.errors import OmgoptimError
from omgoptim.measure.kernels import compute_dtypes, query_kernels
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.program_macs import count_program
from omgoptim.measure.timing import LATENCY
from omgoptim.measure.weight_storage import StoredWeights, module_layers, saved_layers, stored_layers
from omgoptim.models.artifact import PROGRAM, Manifest
from omgoptim.models.onnx_file import load
from omgoptim.models.output_check import read_check
from omgoptim.reports import Coverage, LayerPrecision, Skip
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.engine import Kernel
from omgoptim.techniques.quantize._diagnostics.coverage import REPLACED_SUFFIXES

if TYPE_CHECKING:
    from torch import nn

INTEGER_SCHEMES = ("static", "dynamic", "qat")
"""Schemes whose aim is integer arithmetic; the others store in fewer bits and compute in float."""

LOOKUPS = ("Gather", "Embedding", "EmbeddingBag")
"""Operators that only look rows up: there is nothing to compute in integers."""

STORED_ONLY = ("GRU", "RNN")
"""Operators that compute and that no engine here computes in integers: their int8 is storage, whatever the scheme."""

ENOUGH = 0.5
"""Share of the changed layers' multiply-accumulates that must be computed in integers where those were the aim."""

NAMED = 3
"""How many layers a sentence names."""


@dataclass(frozen=True, slots=True)
class _Pair:
    before: StoredWeights
    after: StoredWeights
    computed_in: str | None


def read_kernels(process: MeasuringProcess) -> list[Kernel]:
    """What the engine runs, where it tells; nothing else depends on it, so a failure to tell is none of the run."""
    try:
        return query_kernels(process, LATENCY)
    except OmgoptimError:
        return []


def prove(
    program: Path | None,
    module: nn.Module | None,
    artifact: Path,
    scheme: str,
    skipped: Sequence[Skip],
    kernels: Sequence[Kernel],
    precision: str = "float32",
    macs: Mapping[str, int] | None = None,
) -> Coverage | None:
    """What became of every layer with weights.

    Args:
        program: the float program, which a program's artifact was made from.
        module: the float module, which a module's artifact was made from.
        artifact: the artifact's folder.
        scheme: name of the technique: `fp32` quantizes nothing, and has no coverage.
        skipped: layers that the technique left alone, with its reasons.
        kernels: what the engine that measured the artifact runs, from `read_kernels`.
        precision: what the model comes in, of which `program` and `module` may be a float32 copy.
        macs: path to multiply-accumulates of the module's layers; a program's are counted here.

    Returns:
        The proof; None where nothing was to be quantized, or what it was made from is not there.
    """
    runtime = Manifest.read(artifact).runtime
    of_module = ENGINES[runtime].runs == "module"
    if scheme == "fp32":
        return None
    if of_module and module is not None:
        pairs = _module_pairs(module, artifact, kernels)
        work = dict(macs or {})
    elif not of_module and program is not None:
        pairs = _program_pairs(program, artifact / PROGRAM, kernels)
        work = _program_work(program, artifact, pairs)
    else:
        return None
    pairs = [replace(pair, before=_as_it_came(pair.before, precision)) for pair in pairs]
    reasons = {skip.path: skip.reason for skip in skipped}
    return _coverage([_record(pair, reasons) for pair in pairs], _weight_share(pairs), scheme, runtime, work)


def _program_work(program: Path, artifact: Path, pairs: Sequence[_Pair]) -> dict[str, int]:
    """Path to multiply-accumulates of one sample; empty where they cannot be counted."""
    sample = {name: array[:1] for name, array in read_check(artifact).batch.items()}
    by_node = count_program(program, sample).by_node
    return (
        {pair.before.path: sum(by_node.get(node, 0) for node in pair.before.nodes) for pair in pairs} if by_node else {}
    )


def _as_it_came(layer: StoredWeights, precision: str) -> StoredWeights:
    """A layer of a float32 copy with the dtype and bytes of what it is a copy of."""
    if precision == "float32" or layer.dtype != "float32" or not _bits(precision):
        return layer
    tensors = {name: size * _bits(precision) // 32 for name, size in layer.tensors.items()}
    return replace(layer, dtype=precision, tensors=tensors)


def coverage_warnings(coverage: Coverage | None, runtime: str) -> list[str]:
    """What must be said where integers are stored and floats are computed."""
    if coverage is None or coverage.verdict != "SIMULATED":
        return []
    floating = [one for one in _aimed(coverage.layers) if one.computed_in != "int8"]
    other = "openvino" if runtime == "onnxruntime" else "onnxruntime"
    kinds = sorted({one.op_after for one in floating if one.op_after in STORED_ONLY})
    advice = (
        f"no engine here computes {' or '.join(kinds)} in integers"
        if all(one.op_after in STORED_ONLY for one in floating)
        else f"try runtime {other}, or scheme static with another algorithm (onnxruntime or nncf)"
    )
    return [
        f"int8 is simulated: {runtime} computes {_count(len(floating), 'quantized layer')} in "
        f"{_numbers_text(floating)} ({_names(floating)}), so that the artifact is smaller and hardly faster; {advice}"
    ]


def _program_pairs(source: Path, program: Path, kernels: Sequence[Kernel]) -> list[_Pair]:
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
        told = {numbers[node] for one in found for node in one.nodes if node in numbers}
        pairs.append(_Pair(layer, now, _computed(now, told)))
    return pairs


def _computed(layer: StoredWeights, told: Collection[str]) -> str | None:
    """Of several answers the one that is not int8; rows that are looked up are converted before any arithmetic."""
    number = max(told, key=lambda one: one != "int8", default=None)
    return "float32" if number == "int8" and layer.op == "Gather" else number


def _module_pairs(module: nn.Module, artifact: Path, kernels: Sequence[Kernel]) -> list[_Pair]:
    before = module_layers(module)
    after = {layer.path: layer for layer in saved_layers(artifact, before)}
    numbers = {kernel.name: kernel.computed_in for kernel in kernels}
    return [_Pair(layer, after.get(layer.path, layer), numbers.get(layer.path)) for layer in before]


def _record(pair: _Pair, reasons: Mapping[str, str]) -> LayerPrecision:
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
    return record.model_copy(update={"reason": reasons.get(before.path, "its weights are stored as they were")})


def _weight_share(pairs: Sequence[_Pair]) -> float:
    """Of the bytes before, those whose layer is stored in fewer bits; a weight that layers share counts once."""
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
    told = [one for one in changed if one.computed_in is not None]
    integer = [one for one in told if one.computed_in == "int8"]
    verdict = _verdict(changed, scheme, work)
    return Coverage(
        verdict=verdict,
        why=_why(verdict, changed, len(layers), share, runtime),
        changed=len(changed),
        total=len(layers),
        integer=len(integer) if told else None,
        weight_share=share,
        layers=layers,
    )


def _verdict(
    changed: Sequence[LayerPrecision], scheme: str, work: Mapping[str, int]
) -> Literal["REAL", "SIMULATED", "NO-OP"]:
    """By what is computed: multiply-accumulates, or bytes where those were not counted."""
    if not changed:
        return "NO-OP"
    aimed = _aimed(changed)
    costs = {one.path: work.get(one.path, 0) if any(work.values()) else one.bytes for one in aimed}
    integer = sum(costs[one.path] for one in aimed if one.computed_in == "int8")
    if scheme in INTEGER_SCHEMES and integer < ENOUGH * sum(costs.values()):
        return "SIMULATED"
    return "REAL"


def _aimed(layers: Sequence[LayerPrecision]) -> list[LayerPrecision]:
    """The changed layers that compute something, and of which the engine tells what in."""
    return [one for one in layers if _is_changed(one) and one.computed_in is not None and one.op_after not in LOOKUPS]


def _why(verdict: str, changed: Sequence[LayerPrecision], total: int, share: float, runtime: str) -> str:
    """`20 of 21 layers in int8, 99 % of the weight bytes; 20 computed in integers by onnxruntime`"""
    if verdict == "NO-OP":
        return f"none of {_count(total, 'layer')} is stored in fewer bits."
    kinds = " and ".join(sorted({one.dtype_after.removeprefix("u") for one in changed}))
    stored = f"{len(changed)} of {_count(total, 'layer')} in {kinds}, {_percent(share)} of the weight bytes"
    told = [one for one in changed if one.computed_in is not None]
    if not told:
        return f"{stored}; {runtime} does not tell what it computes them in."
    integer = [one for one in told if one.computed_in == "int8"]
    floating = [one for one in told if one.computed_in != "int8"]
    if not integer:
        numbers = _numbers_text(floating)
        if numbers == kinds:
            return f"{stored}; {runtime} computes them in {numbers}."
        only = "but only in storage" if verdict == "SIMULATED" else "in storage"
        return f"{stored}, {only}: {runtime} computes them in {numbers}."
    rest = f", {_count(len(floating), 'layer')} in {_numbers_text(floating)} ({_names(floating)})" if floating else ""
    return f"{stored}; {len(integer)} computed in integers by {runtime}{rest}."


def _is_changed(layer: LayerPrecision) -> bool:
    return _bits(layer.dtype_after) < _bits(layer.dtype)


def _bits(dtype: str) -> int:
    """Of `uint8`, `bfloat16`, `float8e4m3fn`: the first number in its name."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0


def _numbers_text(layers: Sequence[LayerPrecision]) -> str:
    return " and ".join(sorted({one.computed_in for one in layers if one.computed_in is not None}))


def _names(layers: Sequence[LayerPrecision]) -> str:
    return ", ".join([one.path or "the model itself" for one in layers[:NAMED]] + ["…"] * (len(layers) > NAMED))


def _percent(share: float) -> str:
    """A share that is not all is never told as 100 %."""
    return "all" if share >= 1 else f"{min(99.9, 100 * share):.3g} %"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
