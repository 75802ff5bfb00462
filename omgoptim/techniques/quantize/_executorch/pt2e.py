"""Int8 by ExecuTorch's XNNPACK quantizer and torchao's PT2E: per-channel weights, activations static or dynamic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from omgoptim.errors import TechniqueError
from omgoptim.models.forward import NamedBatch
from omgoptim.models.globs import is_selected
from omgoptim.models.samples import forward_args
from omgoptim.requests.quantize import Dynamic, Static
from omgoptim.runtimes.export_patches import quiet_export
from omgoptim.runtimes.signature import flatten
from omgoptim.runtimes.torch_engines import to_array
from omgoptim.techniques.quantize._ptq.sqnr import sqnr_db

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

    from omgoptim.techniques.quantize._executorch.lowering import LoweringInput

HELD_OUT, MAX_HELD_OUT = 0.25, 64
"""Share of the calibration samples, and the most of them, on which observers are compared and nothing is calibrated."""

MSE_SAMPLES = 64
"""Most samples for an observer of histograms, which takes many times the forward pass of a sample."""

MIN_GAIN_DB = 0.3
"""Least gain in output SQNR for another observer than ExecuTorch's own."""

ATTENTION = ("aten.softmax.int", "aten._softmax.default", "aten.scaled_dot_product_attention.default")
"""Operators that show attention."""


def quantize(
    exported: ExportedProgram, given: LoweringInput, params: Static | Dynamic
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
            args, kwargs = forward_args(given.signature, given.example)
            if isinstance(params, Static):
                best, notes = _static(module, given, params)
            else:  # one call, in which the weights are observed
                best, notes = _converted(module, params, [(args, kwargs)]), []
            return torch.export.export(best, args, kwargs), notes
        except TechniqueError:
            raise
        except Exception as error:  # torchao raises kinds of its own without a common base
            message = next((line for line in str(error).splitlines() if line.strip()), "")
            raise TechniqueError(
                "ExecuTorch cannot quantize the model", f"{type(error).__name__}: {message[:300]}", "scheme fp32"
            ) from error


def _static(module: fx.GraphModule, given: LoweringInput, params: Static) -> tuple[fx.GraphModule, list[str]]:
    """Calibrate with each observer, and keep the one whose outputs are closest on held-out samples."""
    if any(str(node.target) in ATTENTION for node in module.graph.nodes):
        raise TechniqueError(
            "static quantization of this network is not supported on ExecuTorch",
            "it has attention, whose outputs plain ranges ruin",
            "use scheme dynamic",
        )
    batches = [dict(batch) for batch in given.run.calibration[: params.calibration_samples]]
    held = min(MAX_HELD_OUT, int(len(batches) * HELD_OUT))
    fit, held_out = batches[: len(batches) - held], batches[len(batches) - held :]
    observers = _observers(params.range_method)
    calls = [forward_args(given.signature, batch) for batch in fit]
    found: dict[str, tuple[float, fx.GraphModule]] = {}
    wanted = _outputs(module, given, held_out or fit)
    for name in observers:
        given.run.progress(f"calibrating with {name} ranges", None)
        model = _converted(module, params, calls[: MSE_SAMPLES if name == "mse" else None], observers[name])
        found[name] = sqnr_db(wanted, _outputs(model, given, held_out or fit)), model
    plain = next(iter(found))
    best = max(found, key=lambda name: found[name][0])
    best = best if found[best][0] > found[plain][0] + MIN_GAIN_DB else plain
    return found[best][1], [f"Activation ranges by {best}: SQNR {found[best][0]:.1f} dB."]


def _outputs(model: fx.GraphModule, given: LoweringInput, batches: Sequence[NamedBatch]) -> list[list[Any]]:
    import torch

    found = []
    with torch.no_grad():
        for batch in batches:
            args, kwargs = forward_args(given.signature, batch)
            found.append([np.array(to_array(leaf)) for leaf in flatten(model(*args, **kwargs))])
    return found


def _converted(
    module: fx.GraphModule,
    params: Static | Dynamic,
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    observer: Callable[..., Any] | None = None,
) -> fx.GraphModule:
    """Prepare a copy, run the calls through it, and convert it."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = isinstance(params, Dynamic)
    config = get_symmetric_quantization_config(is_per_channel=params.granularity == "per_channel", is_dynamic=dynamic)
    if observer is not None:
        spec = replace(config.input_activation, observer_or_fake_quant_ctr=observer)
        config = replace(config, input_activation=spec, output_activation=spec)
    quantizer = XNNPACKQuantizer()
    if dynamic:
        quantizer.set_operator_type(torch.ops.aten.linear.default, config)
    else:
        quantizer.set_global(config)
    quantizer.set_filter_function(lambda node: is_selected([_path(node)], params.targets, params.ignore))
    prepared = prepare_pt2e(copy.deepcopy(module), quantizer)
    with torch.no_grad():
        for args, kwargs in calls:
            prepared(*args, **kwargs)
    converted: fx.GraphModule = convert_pt2e(prepared)
    return converted


def _observers(method: str) -> dict[str, Callable[..., Any] | None]:
    """Return observer factories by range method, ExecuTorch's own first; of `auto` all that are worth a try."""
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

    eps = 2**-12
    known: dict[str, Callable[..., Any] | None] = {
        "mse": HistogramObserver.with_args(eps=eps),
        "minmax": MinMaxObserver.with_args(eps=eps),
        "moving_average": MovingAverageMinMaxObserver.with_args(eps=eps),
    }
    if method == "auto":
        return {name: known[name] for name in ("mse", "minmax")}
    if method not in known:
        raise TechniqueError(
            f"range method {method} does not exist on ExecuTorch", f"it has {', '.join(known)}", "range_method auto"
        )
    return {method: known[method]}


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


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
