"""Int8 by ExecuTorch's XNNPACK quantizer and torchao's PT2E: per-channel weights, activations static or dynamic."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from omgoptim.errors import DataError, TechniqueError
from omgoptim.models.forward import NamedBatch
from omgoptim.models.globs import is_selected
from omgoptim.models.samples import forward_args
from omgoptim.requests.quantize import Dynamic, Static
from omgoptim.runtimes.export_patches import quiet_export
from omgoptim.runtimes.signature import flatten
from omgoptim.runtimes.torch_engines import to_array
from omgoptim.techniques.quantize._executorch.improved_weights import improve_weights, module_path
from omgoptim.techniques.quantize._ptq.calibration import Batch, split
from omgoptim.techniques.quantize._ptq.observers import METHODS, Method, RangeObserver, not_finite
from omgoptim.techniques.quantize._ptq.pipeline import rewrites
from omgoptim.techniques.quantize._ptq.state import MIN_CHOICE_GAIN_DB, MIN_STEP_GAIN_DB, apply_preset, sqnr_db

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

    from omgoptim.techniques.quantize._executorch.lowering import LoweringInput

MAX_HELD_OUT = 64
"""Maximum held-out calibration samples on which weights and ranges are compared. Chosen: noise against time."""

SAME_DB = 60.0
"""Minimum output SQNR of a module with the unchanged weights of its ONNX program. Chosen: above it only rounding
differs, a wrong weight is far below."""

WEIGHT_EPS, ACTIVATION_EPS = 2**-20, 2**-16
"""Minimum scales. Chosen: ExecuTorch's own 2**-12 is a coarse step for weights below 0.03, as depthwise layers have."""

ATTENTION = ("aten.softmax.int", "aten._softmax.default", "aten.scaled_dot_product_attention.default")
"""Operators that show attention."""


def quantize(
    exported: ExportedProgram, source: LoweringInput, params: Static | Dynamic
) -> tuple[ExportedProgram, list[str]]:
    """Return the quantized program, exported again, and notes for the summary.

    Raises:
        TechniqueError: the network is not for this scheme, or ExecuTorch cannot quantize it.
    """
    import torch

    with quiet_export():
        module = exported.module()
        _keep_integer_scalars(module)
        try:
            args, kwargs = forward_args(source.signature, source.example)
            if isinstance(params, Static):
                best, notes = _static(module, source, params)
            else:
                prepared, notes = _with_observers(module, params), []
                _observe(prepared, source, [source.example])  # the weights
                best = _convert(prepared)
            return torch.export.export(best, args, kwargs), notes
        except (TechniqueError, DataError):
            raise
        except Exception as error:  # torchao raises kinds of its own without a common base
            message = next((line for line in str(error).splitlines() if line.strip()), "")
            raise TechniqueError(
                "ExecuTorch cannot quantize the model", f"{type(error).__name__}: {message[:300]}", "use scheme fp32"
            ) from error


def _static(module: fx.GraphModule, source: LoweringInput, params: Static) -> tuple[fx.GraphModule, list[str]]:
    """Quantize with each range method and, if the preset has them, improved weights; keep the best on held-out data."""
    if any(str(node.target) in ATTENTION for node in module.graph.nodes):
        raise TechniqueError(
            "static quantization of this network is not supported on ExecuTorch",
            "it has attention, and min/max ranges of all activations destroy its outputs",
            "use scheme dynamic",
        )
    params = apply_preset(params, "balanced")  # what nobody left open any more stays
    batches = [dict(batch) for batch in source.run.calibration[: params.calibration_samples]]
    fit, held_out = split(batches)
    held_out = held_out[:MAX_HELD_OUT]
    reference = _outputs(module, source, held_out)
    forms, notes = _float_forms(module, source, params, batches, held_out)
    methods = METHODS[params.rounding == "adaround"] if params.range_method == "auto" else (params.range_method,)
    calibrated, sqnrs = [], []
    for form, in_float in forms:
        source.run.progress("calibrating", None)
        observed = _with_observers(form, params, in_float)
        _observe(observed, source, fit)
        calibrated.append(observed)
        sqnr_by_method: dict[Method, float] = {}
        for method in methods:
            model = _convert(_with_observers(form, params, in_float, observed), method)
            sqnr_by_method[method] = sqnr_db(reference, _outputs(model, source, held_out))
        sqnrs.append(sqnr_by_method)
    chosen = [
        max(sqnr_by_method, key=lambda m: sqnr_by_method[m] + MIN_CHOICE_GAIN_DB * (m == methods[0]))
        for sqnr_by_method in sqnrs
    ]
    best = [sqnr_by_method[method] for sqnr_by_method, method in zip(sqnrs, chosen, strict=True)]
    index = len(best) - 1 if best[-1] > best[0] + MIN_STEP_GAIN_DB else 0
    notes.append(f"Range method {chosen[index]}: SQNR {best[index]:.1f} dB.")
    if len(best) > 1:
        gain = f"raised SQNR from {best[0]:.1f} to {best[1]:.1f} dB"
        result = gain if index else "did not raise the SQNR and were left out"
        notes.append(f"Equalization, bias correction and rounding of the weights {result}.")
    form, in_float = forms[index]
    if in_float:
        notes.append(f"Layers in float32, where int8 caused most of the quantization noise: {', '.join(in_float)}.")
    if fit[0] is not held_out[0]:
        _observe(calibrated[index], source, held_out)
    return _convert(_with_observers(form, params, in_float, calibrated[index]), chosen[index]), notes


def _float_forms(
    module: fx.GraphModule, source: LoweringInput, params: Static, batches: Sequence[Batch], held_out: Sequence[Batch]
) -> tuple[list[tuple[fx.GraphModule, list[str]]], list[str]]:
    """Return the module, then its form with improved weights if there is one, each with the layers to keep in float.

    Also a note, where the weights could not be improved.
    """
    forms: list[tuple[fx.GraphModule, list[str]]] = [(module, [])]
    if not rewrites(params):
        return forms, []
    reason = "the model has no ONNX program"
    if source.program is not None:
        try:
            improved = improve_weights(module, source.program, batches, params, source.run)
        except TechniqueError as error:
            improved, reason = None, error.what
        else:
            reason = "the layers of its ONNX program do not match those of the module"
        if improved is not None:
            before, after, in_float = improved
            if sqnr_db(_outputs(module, source, held_out[:1]), _outputs(before, source, held_out[:1])) > SAME_DB:
                return [*forms, (after, in_float)], []
    return forms, [f"Equalization, bias correction and rounding of the weights were left out: {reason}."]


def _outputs(model: fx.GraphModule, source: LoweringInput, batches: Sequence[NamedBatch]) -> list[list[Any]]:
    import torch

    found = []
    with torch.no_grad():
        for batch in batches:
            args, kwargs = forward_args(source.signature, batch)
            found.append([np.array(to_array(leaf)) for leaf in flatten(model(*args, **kwargs))])
    return found


def _observe(prepared: fx.GraphModule, source: LoweringInput, batches: Sequence[NamedBatch]) -> None:
    import torch

    with torch.no_grad():
        for batch in batches:
            args, kwargs = forward_args(source.signature, batch)
            prepared(*args, **kwargs)


def _with_observers(
    module: fx.GraphModule,
    params: Static | Dynamic,
    in_float: Sequence[str] = (),
    observed: fx.GraphModule | None = None,
) -> fx.GraphModule:
    """Return a copy of the module with observers: new ones, or those of `observed`, which a conversion uses up."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    dynamic, per_channel = isinstance(params, Dynamic), params.granularity == "per_channel"
    config = get_symmetric_quantization_config(is_per_channel=per_channel, is_dynamic=dynamic)
    observer = (PerChannelMinMaxObserver if per_channel else MinMaxObserver).with_args(eps=WEIGHT_EPS)
    config = replace(config, weight=replace(config.weight, observer_or_fake_quant_ctr=observer))
    quantizer = XNNPACKQuantizer()
    if isinstance(params, Dynamic):
        quantizer.set_operator_type(torch.ops.aten.linear.default, config)
    else:
        ranges = _range_observer(params.symmetric).with_args(eps=ACTIVATION_EPS)
        spec = replace(config.input_activation, observer_or_fake_quant_ctr=ranges)
        if params.symmetric:
            spec = replace(spec, qscheme=torch.per_tensor_symmetric)
        quantizer.set_global(replace(config, input_activation=spec, output_activation=spec))

    def is_chosen(node: fx.Node) -> bool:
        path = module_path(node)
        return path not in in_float and is_selected([path], params.targets, params.ignore)

    quantizer.set_filter_function(is_chosen)
    prepared: fx.GraphModule = prepare_pt2e(copy.deepcopy(module), quantizer)
    for name, observer in [] if observed is None else observed._modules.items():  # a shared one has several names
        if name.startswith("activation_post_process"):
            prepared.add_module(name, observer)
    return prepared


def _convert(prepared: fx.GraphModule, method: Method = "minmax") -> fx.GraphModule:
    """Return the quantized form of an observed module, which is used up."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    for observer in prepared.modules():
        if hasattr(observer, "range_method"):
            setattr(observer, "range_method", method)  # noqa: B010  of the class below
    converted: fx.GraphModule = convert_pt2e(prepared)
    return converted


def _range_observer(symmetric: bool) -> Any:
    """Return the class of an observer for PT2E that has the ranges of `_ptq/observers.py`."""
    import torch
    from torchao.quantization.pt2e import UniformQuantizationObserverBase

    class Observer(UniformQuantizationObserverBase):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.observer = RangeObserver()
            self.range_method: Method = "minmax"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.observer.add(x.detach().numpy(), histogram=True):
                raise not_finite("an activation")
            return x

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            low, high = self.observer.range(self.range_method, symmetric)
            found: tuple[torch.Tensor, torch.Tensor] = self._calculate_qparams(torch.tensor(low), torch.tensor(high))
            return found

    return Observer


def _keep_integer_scalars(module: fx.GraphModule) -> None:
    """Let integer tensors add and multiply plain numbers: the quantizer turns a number into a float tensor."""
    import torch

    scalar = {
        torch.ops.aten.add.Tensor: torch.ops.aten.add.Scalar,
        torch.ops.aten.mul.Tensor: torch.ops.aten.mul.Scalar,
    }
    for node in module.graph.nodes:
        value = node.meta.get("val")
        plain = len(node.args) > 1 and isinstance(node.args[1], int)
        if node.target in scalar and plain and isinstance(value, torch.Tensor) and not value.is_floating_point():
            node.target = scalar[node.target]
    module.recompile()
