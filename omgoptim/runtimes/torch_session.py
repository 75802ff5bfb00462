"""Sessions of the torch engines: conversion from numpy, and timing. Imports torch when called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.runtimes.engine import NumpyBatch, Session, SessionSettings, as_float32, wall_clock
from omgoptim.runtimes.signature import Signature, flatten

if TYPE_CHECKING:
    from torch import Tensor, nn


def missing_device(device: str) -> str | None:
    """Return why torch cannot use a device, or None."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device; install a CUDA build of torch or ask for device cpu"
    return None


def to_tensor(array: NDArray[Any], dtype: str, device: str = "cpu") -> Tensor:
    """Convert an array to a tensor of a signature's dtype: numpy has no bfloat16, so it is float32 there."""
    import torch

    target: torch.dtype = getattr(torch, dtype)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=target)


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Convert a tensor to numpy, floating ones to float32."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensor = tensor.float()
    return as_float32(tensor.numpy())


def open_module(
    module: nn.Module, runner: Callable[..., Any], signature: Signature, settings: SessionSettings
) -> Session:
    """Open a session that calls `runner` (the module, or its compiled form) in inference mode."""
    import torch

    torch.set_num_threads(settings.threads)
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(settings.precision)

    def prepare(batch: NumpyBatch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        tensors = {t.name: to_tensor(batch[t.name], t.dtype, settings.device) for t in signature.inputs}
        return signature.to_call(tensors)

    def lower(tensor: Tensor) -> Tensor:
        return tensor.to(half) if half is not None and tensor.is_floating_point() else tensor

    def call(prepared: tuple[tuple[Tensor, ...], dict[str, Tensor]]) -> Any:
        args, kwargs = prepared
        with torch.inference_mode():
            if half is not None:  # the cast is part of the price of a half-precision module
                args, kwargs = tuple(map(lower, args)), {name: lower(tensor) for name, tensor in kwargs.items()}
            return runner(*args, **kwargs)

    on_gpu = settings.device == "cuda"
    return Session(
        prepare=prepare,
        call=call,
        to_numpy=lambda result: [to_array(leaf) for leaf in flatten(result)],
        seconds=_cuda_clock(call) if on_gpu else wall_clock(call),
        module=module,
        peak_device_bytes=torch.cuda.max_memory_allocated if on_gpu else lambda: None,
    )


def _cuda_clock(call: Callable[[Any], Any]) -> Callable[[Any, int], float]:
    import torch

    def seconds(prepared: Any, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call(prepared)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000 / calls

    return seconds
