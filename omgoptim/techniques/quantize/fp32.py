"""Change nothing: the float32 program, for another engine to run.

What it does: copies the program, and its external data if it has any.
Use when: always worth measuring: an engine alone is often faster than eager torch, at no loss of quality.
What you really get: the same storage; speed from the engine's own fusions and kernels.
Limits: none.
Source: none needed; it is the reference for what quantization adds to an engine.
"""

from __future__ import annotations

from pathlib import Path

from omgoptim.requests.quantize import Fp32
from omgoptim.techniques.quantize._onnx.program import copy
from omgoptim.techniques.registry import Outcome, ProgramRun, technique


@technique(Fp32, runtimes=("onnxruntime", "openvino"), needs_data=False, source="the float32 program itself")
def apply(source: Path, target: Path, params: Fp32, run: ProgramRun) -> Outcome:
    """Copy `source` to `target`."""
    del params, run
    copy(source, target)
    return Outcome(changed=[])
