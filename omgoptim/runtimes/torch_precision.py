"""Conversion of a torch module to another precision, and its weights as tensors for a safetensors file.

`convert` changes the module, `state_of` returns its state, `load_state` loads it into a freshly converted module. The
int8 layers are torch.ao's dynamic ones (Linear, LSTM, GRU and the cells): deprecated there, and still the only way to
an int8 GRU on a CPU. Their packed weights are opaque objects; here they are saved as int8 tensors with their scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.runtimes.engine import Kernel

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Half precisions."""


def convert(module: nn.Module, precision: str) -> nn.Module:
    """Convert the module in place to a precision; `float32` leaves it unchanged."""
    if precision in HALF:
        return module.to(HALF[precision])
    if precision == "int8_dynamic":
        return _dynamic_int8(module)
    return module


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state, every packed int8 weight as `<path>.<name>.int8`, `.scale` and `.zero_point`."""
    state: dict[str, Tensor] = {}
    packed = {path: layer for path, layer in module.named_modules() if _is_packed(layer)}
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and not _under(name, packed):
            state[name] = value
    for path, layer in packed.items():
        prefix = f"{path}." if path else ""
        weights, biases = _weights_and_biases(layer)
        for name, weight in weights.items():
            state[f"{prefix}{name}.int8"] = weight.int_repr()
            state[f"{prefix}{name}.scale"] = weight.q_per_channel_scales().float()
            state[f"{prefix}{name}.zero_point"] = weight.q_per_channel_zero_points().to(torch.int32)
        state.update({f"{prefix}{name}": bias for name, bias in biases.items() if bias is not None})
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the result of `state_of` into a freshly converted module of the same architecture.

    Raises:
        KeyError: the module has other entries.
        RuntimeError: an entry has another shape.
    """
    packed = {path: layer for path, layer in module.named_modules() if _is_packed(layer)}
    unpacked = {name: value for name, value in state.items() if not _under(name, packed)}
    own_state = module.state_dict(keep_vars=True)  # load_state_dict would ask packed layers for their opaque objects
    parameters = {
        name: value for name, value in own_state.items() if isinstance(value, Tensor) and not _under(name, packed)
    }
    if parameters.keys() != unpacked.keys():
        missing, unexpected = parameters.keys() - unpacked.keys(), unpacked.keys() - parameters.keys()
        raise KeyError(f"missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    for name, parameter in parameters.items():
        if parameter.shape != unpacked[name].shape:
            raise RuntimeError(
                f"{name} has shape {tuple(unpacked[name].shape)}, the module's has {tuple(parameter.shape)}"
            )
        parameter.data = unpacked[name]
    for path, layer in packed.items():
        prefix = f"{path}." if path else ""
        layer_state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        _set_weights(layer, layer_state)


def converted_layers(module: nn.Module) -> list[tuple[str, str]]:
    """Return path and kind of every int8 layer of a converted module."""
    return [(path, type(layer).__name__) for path, layer in module.named_modules() if _is_packed(layer)]


def kernels_of(module: nn.Module) -> list[Kernel]:
    """Return the compute dtype of every layer with weights: that of its weights, or int8 if torch.ao packed them."""
    packed = {path for path, _ in converted_layers(module)}
    found = []
    for path, layer in module.named_modules():
        dtypes = (parameter.dtype for parameter in layer.parameters(recurse=False) if parameter.is_floating_point())
        dtype = next(dtypes, None)
        if path in packed or dtype is not None:
            numbers = "int8" if path in packed else str(dtype).removeprefix("torch.")
            found.append(Kernel(path, type(layer).__name__, numbers))
    return found


def _dynamic_int8(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation of torch.ao and of quantized dtypes
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        kinds = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)
        converted: nn.Module = quantize_dynamic(  # type: ignore[no-untyped-call]
            module, dict.fromkeys(kinds, per_channel_dynamic_qconfig)
        )
    return converted


def _under(name: str, paths: Iterable[str]) -> bool:
    """Return whether a state's entry belongs to one of the modules at `paths` (the root's path is empty)."""
    return any(not path or name.startswith(f"{path}.") for path in paths)


def _is_packed(layer: nn.Module) -> bool:
    dynamic = type(layer).__module__.startswith("torch.ao.nn.quantized.dynamic")
    return dynamic and type(layer).__name__ != "PackedParameter"


def _weights_and_biases(layer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    if hasattr(layer, "get_weight"):  # recurrent layers and cells
        return dict(layer.get_weight()), dict(layer.get_bias())
    return {"weight": layer.weight()}, {"bias": layer.bias()}


def _set_weights(layer: Any, state: Mapping[str, Tensor]) -> None:
    def weight(name: str) -> Tensor:
        scale, zero_point = state[f"{name}.scale"].double(), state[f"{name}.zero_point"].long()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized: Tensor = torch._make_per_channel_quantized_tensor(state[f"{name}.int8"], scale, zero_point, 0)
        return quantized

    if not hasattr(layer, "get_weight"):
        layer.set_weight_bias(weight("weight"), state.get("bias"))
        return
    prepack = torch.ops.quantized.linear_prepack
    if hasattr(layer, "_packed_weight_ih"):  # a cell
        layer._packed_weight_ih = prepack(weight("weight_ih"), state["bias_ih"])
        layer._packed_weight_hh = prepack(weight("weight_hh"), state["bias_hh"])
        return
    from torch.ao.nn.quantized.dynamic.modules.rnn import PackedParameter

    values = []
    directions = ["", "_reverse"] if layer.bidirectional else [""]
    for suffix in (f"_l{index}{direction}" for index in range(layer.num_layers) for direction in directions):
        bias_ih, bias_hh = state[f"bias_ih{suffix}"], state[f"bias_hh{suffix}"]
        packed_ih = prepack(weight(f"weight_ih{suffix}"), bias_ih)
        packed_hh = prepack(weight(f"weight_hh{suffix}"), bias_hh)
        cell = torch.ops.quantized.make_quantized_cell_params_dynamic(packed_ih, packed_hh, bias_ih, bias_hh, True)
        values.append(PackedParameter(cell))  # type: ignore[no-untyped-call]
    layer._all_weight_values = nn.ModuleList(values)
