"""Coverage of a rewrite: changed and skipped layers, read from the written program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto

from omgoptim.errors import NoLayerChanged
from omgoptim.models.onnx_graph import NIBBLES, OnnxLayer, find_layers
from omgoptim.reports import Change, Skip
from omgoptim.techniques.registry import Outcome

IGNORED = "excluded by targets or ignore"

ALREADY = "already quantized in the source program"

EMBEDDING = "int{} weight, computed in float"

NOT_TAKEN = "the quantizer kept it in float"

REPLACED_SUFFIXES = ("_quant", "_MatMul_quant", "_MatMul", "_quantized_rows")
"""Suffixes that rewrites append to the name of the node they replace."""


def outcome(
    before: Sequence[OnnxLayer],
    chosen: Sequence[OnnxLayer],
    after: ModelProto,
    reasons: Mapping[str, str],
    precision: str,
    precisions: Mapping[str, str] | None = None,
) -> Outcome:
    """Compare the layers before with those of the written program.

    Args:
        before: every layer of the float program.
        chosen: those that targets and ignore leave to be quantized.
        after: the program that was written.
        reasons: op type to the reason why the quantizer leaves it in float.
        precision: what a changed layer is now, for people.
        precisions: the same by node name, of layers that are something else.
    """
    quantized = {layer.node: layer for layer in find_layers(after) if layer.is_quantized}
    names = {layer.node for layer in chosen}
    seen: set[tuple[str, str, str]] = set()
    changed: list[Change] = []
    skipped: list[Skip] = []
    for layer in before:
        if (layer.path, layer.op, layer.weight) in seen:  # a cell in a loop, unrolled: one layer, listed once
            continue
        seen.add((layer.path, layer.op, layer.weight))
        if layer.is_quantized:
            skipped.append(Skip(path=layer.path, reason=ALREADY, kind="already_compressed"))
        elif written := [quantized[n] for n in (layer.node, *_replaced(layer.node)) if n in quantized]:
            now = (precisions or {}).get(layer.node, precision)
            if layer.op == "Gather":
                now = EMBEDDING.format(4 if written[0].weight.endswith(f"{NIBBLES}_quantized") else 8)
            changed.append(Change(path=layer.path, what=layer.what, before="float32", after=now))
        elif layer.node not in names:
            skipped.append(Skip(path=layer.path, reason=IGNORED, kind="excluded"))
        else:
            skipped.append(Skip(path=layer.path, reason=reasons.get(layer.op, NOT_TAKEN), kind="unsupported"))
    return Outcome(changed, skipped)


def no_layer_left(scheme: str, before: Sequence[OnnxLayer], chosen: Sequence[OnnxLayer]) -> NoLayerChanged | None:
    """Return the error of a scheme that has no layer to quantize, else None.

    Args:
        scheme: in words: `static quantization`.
        before: every layer of the program.
        chosen: those that are float and that targets and ignore leave.
    """
    what = f"scheme {scheme} would change no layer"
    if not before:
        why, fix = "the program has no layer with weights", "use scheme fp32, which compares engines without quantizing"
        return NoLayerChanged(what, why, fix, schemes=["fp32"])
    if all(layer.is_quantized for layer in before):
        return NoLayerChanged(what, "the program is quantized already", "start from the float model")
    if not chosen:
        return NoLayerChanged(what, "targets and ignore exclude every layer", "widen targets or narrow ignore")
    return None


def _replaced(node: str) -> list[str]:
    """Return the names that a node may have after a rewrite."""
    return [node + suffix for suffix in REPLACED_SUFFIXES]
