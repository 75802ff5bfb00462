"""Torch engines: eager, and torch.compile (Inductor), whose kernels are compiled in every new process.

torch.compile needs a C++ compiler on a CPU. Its code cannot be shipped: the artifact is the module, compiled where it
opens. Imports torch when called.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.runtimes.engine import Engine, NumpyBatch, Session, SessionSettings, as_float32, wall_clock
from omgoptim.runtimes.signature import Signature, flatten

if TYPE_CHECKING:
    from torch import Tensor, nn


def to_tensor(array: NDArray[Any], dtype: str, device: str = "cpu") -> Tensor:
    """Convert an array to a tensor of a signature's dtype: numpy has no bfloat16, so it is float32 there."""
    import torch

    target: torch.dtype = getattr(torch, dtype)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=target)


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Convert a tensor to numpy; floating-point ones to float32."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float64):
        tensor = tensor.float()
    return as_float32(tensor.numpy())


def missing(device: str) -> str | None:
    """Return why torch cannot be used on a device, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device: install a CUDA build of torch, or use device cpu"
    return None


def missing_compiler(device: str) -> str | None:
    """Return why torch.compile cannot be used on a device, or None."""
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return "torch.compile needs a C++ compiler, and none is on the PATH: install g++ or clang"
    if sys.platform == "win32" and device == "cuda":
        return "torch.compile on CUDA needs Triton, which torch does not ship for Windows"
    return missing(device)


def open_eager(module: nn.Module, signature: Signature, settings: SessionSettings) -> Session:
    """Open a module as it is, in eager mode."""
    return _open(module, module, signature, settings)


def open_compiled(module: nn.Module, signature: Signature, settings: SessionSettings) -> Session:
    """Compile a module by `torch.compile` and open it."""
    import torch

    return _open(module, torch.compile(module, dynamic=True), signature, settings)


def _open(module: nn.Module, runner: Callable[..., Any], signature: Signature, settings: SessionSettings) -> Session:
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


ENGINE = Engine("torch_eager", "module", missing, open_eager)
COMPILED = Engine("torch_compile", "module", missing_compiler, open_compiled)
