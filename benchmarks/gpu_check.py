"""Does every CUDA path work, and what does it give? Each engine and precision on each example, in fresh processes.

Needs a CUDA build of torch, and of ONNX Runtime (onnxruntime-gpu) for its rows; a path that is not installed is listed
with what is missing. Without a GPU it says so in one line and ends with status 3: nothing was measured.

    python benchmarks/gpu_check.py [--models digits_cnn lstm minilm] [--timing standard]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import console, keep, machine, table

import omgoptim
from omgoptim.errors import OmgoptimError
from omgoptim.runtimes import ENGINES

NO_GPU = 3
EXAMPLES = Path(__file__).parent.parent / "examples"
MODELS = ("digits_cnn", "lstm", "minilm")
PATHS = (
    ("fp32", "torch_eager"),
    ("fp32", "torch_compile"),
    ("bf16", "torch_eager"),
    ("fp16", "torch_eager"),
    ("bf16", "torch_compile"),
    ("fp16", "torch_compile"),
    ("fp32", "onnxruntime"),
    ("fp16", "onnxruntime"),
    ("static", "onnxruntime"),
    ("weight_only", "onnxruntime"),
    ("fp32", "tensorrt"),
    ("fp16", "tensorrt"),
    ("static", "tensorrt"),
    ("auto", "auto"),
)
"""Scheme and engine. torch_eager in float32 is a profile: it is what all others are compared with."""


def no_device() -> str | None:
    """Why nothing can be measured here, or None."""
    return ENGINES["torch_eager"].missing("cuda")


def measured(project: Path, model: str, scheme: str, runtime: str, timing: str) -> dict[str, Any]:
    """One path's numbers, or the reason why there are none."""
    common: dict[str, Any] = {
        "model": f"examples/{model}.py:build",
        "data": f"examples/{model}.py:load",
        "device": "cuda",
        "timing": timing,
        "runtime": runtime,
        "project": str(project),
    }
    record = {"model": model, "scheme": scheme, "runtime": runtime}
    missing = None if runtime == "auto" else ENGINES[runtime].missing("cuda")
    if missing:
        return record | {"status": "not installed", "why": missing}
    try:
        if (scheme, runtime) == ("fp32", "torch_eager"):
            report = omgoptim.profile(**common)
        else:
            report = omgoptim.quantize(**common, scheme=scheme, max_quality_drop=1.0)
    except OmgoptimError as error:
        return record | {"status": "failed", "why": f"{error.what}: {error.why}"}
    after = report.after or report.before
    numbers = after.model_dump() if after is not None else {}
    kept = ("runtime", "precision", "latency_ms_p50", "throughput_per_s", "peak_memory_bytes", "size_bytes", "quality")
    gains = report.gains.model_dump() if report.gains else {}
    return record | {
        "status": report.outcome,
        **{f"measured_{name}": numbers.get(name) for name in kept},
        "speedup": gains.get("speedup"),
        "quality_drop": gains.get("quality_drop"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--timing", default="standard", choices=["quick", "standard", "careful"])
    arguments = parser.parse_args()
    reason = no_device()
    if reason:
        console.print(f"no GPU path was measured: {reason}")
        return NO_GPU
    began, rows = machine(), []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        shutil.copytree(EXAMPLES, project / "examples")
        for model in arguments.models:
            for scheme, runtime in PATHS:
                rows.append(measured(project, model, scheme, runtime, arguments.timing))
                console.print(json.dumps(rows[-1]))
    columns = ("ms", "speedup", "samples/s", "GPU MB", "drop")
    table(
        "CUDA paths",
        ("path", *columns, "status"),
        [
            (
                f"{row['model']}: {row['scheme']} on {row['runtime']}",
                *(
                    "-" if value is None else value
                    for value in (
                        row.get("measured_latency_ms_p50"),
                        row.get("speedup"),
                        row.get("measured_throughput_per_s"),
                        (row.get("measured_peak_memory_bytes") or 0) / 1e6 or None,
                        row.get("quality_drop"),
                    )
                ),
                row["status"] if "why" not in row else f"{row['status']}: {row['why'][:60]}",
            )
            for row in rows
        ],
    )
    keep("gpu_check", 0, False, began | {"gpu": gpu_name()}, {"rows": rows})
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def gpu_name() -> str:
    """Name of the device that torch uses."""
    import torch

    return str(torch.cuda.get_device_name())


if __name__ == "__main__":
    sys.exit(main())
