"""Lower a module to an ExecuTorch program whose layers XNNPACK computes: float32, static int8, or dynamic int8.

What it does: torch.export at batch 1; for int8, ExecuTorch's quantizer and torchao's PT2E put quantize and dequantize
nodes around the layers (`pt2e.py`); then everything that XNNPACK supports becomes delegates, the rest portable kernels.
Static weights are equalized, bias-corrected and rounded first, as those of ONNX programs (`improved_weights.py`).
Source: https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-overview.html; differs in these weights and
in the ranges, both chosen by output SQNR on held-out calibration samples, in smaller least scales, and in proving from
the written file what was delegated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import NoLayerChanged, TechniqueError
from omgoptim.models.forward import NamedBatch
from omgoptim.models.globs import is_selected, refuse_unknown
from omgoptim.models.pte_file import LAYERS, PteLayer, lowered_layers
from omgoptim.models.samples import as_tensors
from omgoptim.reports import Change
from omgoptim.requests import Params
from omgoptim.requests.quantize import Dynamic, Static
from omgoptim.runtimes.export import exported_program
from omgoptim.runtimes.export_patches import quiet_export
from omgoptim.runtimes.signature import Signature
from omgoptim.techniques.registry import Outcome, ProgramRun, Refusal

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

PRECISIONS = {
    "static": "int8 weight per channel, int8 activations",
    "dynamic": "int8 weight per channel, 8-bit activations quantized at run time",
}
CONV_KINDS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


@dataclass(frozen=True, slots=True)
class LoweringInput:
    """A float32 module in eval mode, and how to call it with one sample."""

    module: nn.Module
    signature: Signature
    """At batch 1."""
    example: NamedBatch
    """One sample."""
    run: ProgramRun
    """Its calibration batches have one sample each."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """Path to class of every layer with weights."""
    program: Path | None = None
    """The float ONNX program of the same module, for the weights of static quantization."""

    @property
    def tensors(self) -> dict[str, Any]:
        return as_tensors(self.example, self.signature.dtypes)


def lower(source: LoweringInput, params: Params | None, target: Path) -> Outcome:
    """Write the `.pte` file `target`, and beside it which module each of its operators comes from.

    Args:
        source: the module, with one sample and its calibration samples.
        params: Static or Dynamic; any other stays in float32.
        target: the file to write.

    Raises:
        TechniqueError: torch or ExecuTorch cannot export the model.
        NoLayerChanged: no layer became int8.
    """
    if isinstance(params, (Static, Dynamic)):
        refuse_unknown((*params.targets, *params.ignore), source.layers)
    exported = exported_program(source.module, source.tensors, source.signature)
    notes: list[str] = []
    if isinstance(params, (Static, Dynamic)):
        from omgoptim.techniques.quantize._executorch.pt2e import quantize

        exported, notes = quantize(exported, source, params)
    source.run.progress("lowering to XNNPACK", None)
    _write(exported, target)
    written = {layer.path: layer for layer in lowered_layers(target)}
    return _outcome(source, written, params, notes) if isinstance(params, (Static, Dynamic)) else Outcome([])


def _write(exported: ExportedProgram, target: Path) -> None:
    with quiet_export():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.exir.lowered_backend_module import get_lowered_submodules

        try:
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            written = edge.to_executorch().buffer
        except Exception as error:  # ExecuTorch raises kinds of its own without a common base
            message = next((line for line in str(error).splitlines() if line.strip()), "")
            raise TechniqueError(
                "ExecuTorch cannot lower the model", f"{type(error).__name__}: {message[:300]}", "use another runtime"
            ) from error
        program = edge.exported_program().graph_module
        handles: dict[str, str] = {}
        for index, (_, lowered, _) in enumerate(get_lowered_submodules(program)):
            for node in lowered.original_module.graph_module.graph.nodes:
                stack = node.meta.get("nn_module_stack")
                is_conversion = "quantize" in str(node.target)  # nodes around a layer have its handle, and no module
                if node.op == "call_function" and stack and not is_conversion and "debug_handle" in node.meta:
                    handles[f"{index}:{node.meta['debug_handle']}"] = list(stack.values())[-1][0]
    target.write_bytes(written)
    target.with_name(LAYERS).write_text(json.dumps(handles))


def _outcome(
    source: LoweringInput, written: Mapping[str, PteLayer], params: Static | Dynamic, notes: list[str]
) -> Outcome:
    changed, skipped, scheme = [], [], params.scheme
    for path, kind in source.layers.items():
        layer = written.get(path)
        if layer is not None and layer.dtype == "int8":
            changed.append(Change(path=path, what=kind, before="float32", after=PRECISIONS[scheme]))
        else:
            chosen = is_selected([path], params.targets, params.ignore)
            skipped.append(Refusal(_reason(kind, layer, scheme), "unsupported" if chosen else "excluded").skip(path))
    if not changed:
        why = "; ".join(sorted({skip.reason for skip in skipped})) or "the model has no layer with weights"
        other = "static" if scheme == "dynamic" and set(source.layers.values()) & set(CONV_KINDS) else "fp32"
        raise NoLayerChanged(f"{scheme} quantization changed no layer", why, f"use scheme {other}", schemes=[other])
    return Outcome(changed, skipped, notes)


def _reason(kind: str, layer: PteLayer | None, scheme: str) -> str:
    if kind in ("GRU", "LSTM", "RNN"):
        return "ExecuTorch's quantizer does not support recurrent layers"
    if kind == "Embedding":
        return "XNNPACK has no embedding operator: the table stays in float"
    if kind in CONV_KINDS and scheme == "dynamic":
        return "dynamic quantization on ExecuTorch supports Linear layers only; scheme static quantizes convolutions"
    return "not delegated to XNNPACK" if layer is None else "kept in float by targets, ignore or the quantizer"
