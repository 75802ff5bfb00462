"""Store the weights in float16, half the bytes; computed in float16 on a GPU, in float32 on most CPUs.

What it does: every float32 weight over 1 KiB is rounded to float16 (11 bits of mantissa, largest value 65504) and read
through a Cast to float32, so that every engine opens the file.
Use when: the file or the download must be half, with practically no change of the outputs. Needs no data.
What you really get: storage half; speed and memory unchanged on most CPUs, where engines widen the weights on opening;
on a GPU the torch engines compute in float16.
Limits: a weight with a value beyond 65504 stays float32 and is listed; values below 6e-8 become zero.
Source: IEEE 754-2019; nothing differs.
"""

from __future__ import annotations

from pathlib import Path

from omgoptim.requests.quantize import Fp16
from omgoptim.techniques.quantize._onnx.weight_storage import write_half
from omgoptim.techniques.registry import Outcome, ProgramRun, technique


@technique(
    Fp16, runtimes=("onnxruntime", "openvino"), needs_data=False, source="IEEE 754-2019", torch_precision="float16"
)
def apply(source: Path, target: Path, params: Fp16, run: ProgramRun) -> Outcome:
    """Read `source`, write the same program with float16 weights to `target`.

    Raises:
        TechniqueError: no weight could be stored so.
    """
    del params, run
    return write_half(source, target, "float16", 1, "use scheme bf16: float32's range")  # opset: as it is
