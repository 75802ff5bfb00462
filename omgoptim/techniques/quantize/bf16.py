"""Store the weights in bfloat16, half the bytes; engines that can compute in bfloat16 do.

What it does: every float32 weight over 1 KiB is rounded to bfloat16 (8 bits of mantissa, float32's range) and read
through a Cast to float32, so that every engine opens the file.
Use when: int8 costs too much quality, on a CPU or GPU with bfloat16 units. Needs no data.
What you really get: storage half; more speed where the engine computes in bfloat16 (OpenVINO with its precision
hint, torch on AVX512-BF16 or AMX), none elsewhere; memory as the engine keeps its weights.
Limits: a value that bfloat16 cannot hold (within 0.4 % of float32's largest) keeps its tensor in float32.
Source: arXiv:1905.12322; nothing differs.
"""

from __future__ import annotations

from pathlib import Path

from omgoptim.requests.quantize import Bf16
from omgoptim.techniques.quantize._onnx.weight_storage import write_half
from omgoptim.techniques.registry import Outcome, ProgramRun, technique


@technique(Bf16, runtimes=("openvino",), needs_data=False, source="arXiv:1905.12322", torch_precision="bfloat16")
def apply(source: Path, target: Path, params: Bf16, run: ProgramRun) -> Outcome:
    """Read `source`, write the same program with bfloat16 weights to `target`.

    Raises:
        TechniqueError: no weight could be stored so.
    """
    del params, run
    return write_half(source, target, "bfloat16", 13)  # the first opset with bfloat16 in Cast
