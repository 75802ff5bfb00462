"""Does training with int8 simulated end at or above post-training static quantization, on a network that int8 ruins?

The network is that of `hard_net.py`. Twice: as both are by default (channels scaled, ranges chosen, biases corrected),
where post-training quantization is about as good as float already; and with none of that in either, where it is not.
Each run is `omgoptim.quantize` as a user has it: what is scored is the converted, reopened artifact, on images that
chose nothing. The two are compared on the same images.

    python benchmarks/quantize_qat.py [--seeds 0 1 2] [--quick]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import hard_net
from record import bar, console, keep, machine, table

import omgoptim

HERE = Path(__file__).parent
EPOCHS = 3
PLAIN = {"range_method": "minmax", "equalize": False, "bias_correction": False, "rounding": "nearest"}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as they are": ({}, {"distill": True}),
    "plain ranges": ({**PLAIN, "algorithm": "onnxruntime"}, {"distill": True, "equalize": False}),
}
"""Settings of static, and of qat."""


def qualities(project: Path, seed: int, scheme: dict[str, Any], quick: bool) -> tuple[float, float]:
    """Accuracy of the float model and of the artifact, on the eval split."""
    report = omgoptim.quantize(
        "hard_net.py:build",
        model_kwargs={"seed": seed},
        data="hard_net.py:load",
        runtime="onnxruntime",
        timing="quick",
        samples=500 if quick else 10_000,
        max_quality_drop=1.0,  # both are told as they are: no layer is kept in float
        seed=seed,
        project=str(project),
        **scheme,
    )
    if report.before is None or report.after is None or report.before.quality is None or report.after.quality is None:
        raise SystemExit("the report lacks its numbers")
    console.print(f"[dim]{report.summary}[/]")
    return report.before.quality, report.after.quality


def main() -> None:
    parser = argparse.ArgumentParser(description="quantization-aware training against post-training static")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a smoke run: one epoch, few images, no claim")
    asked = parser.parse_args()
    began = machine()
    rows, bars, kept = [], [], {}
    with tempfile.TemporaryDirectory(prefix="omgoptim-qat-") as scratch:
        project = Path(scratch)
        for name in ("hard_net.py", "distill_data.py", "pruning_nets.py"):
            shutil.copy(HERE / name, project)
        os.environ.setdefault("OMGOPTIM_HARD_NET", str(hard_net.weights_file().parent))
        for seed in asked.seeds:
            hard_net.build(seed)  # trained before anything else, where it was not
        for name, (static, qat) in WAYS.items():
            gains = []
            for seed in asked.seeds:
                original, calibrated = qualities(project, seed, {"scheme": "static", **static}, asked.quick)
                epochs = 1 if asked.quick else EPOCHS
                _, trained = qualities(project, seed, {"scheme": "qat", "epochs": epochs, **qat}, asked.quick)
                gains.append(100 * (trained - calibrated))
                rows.append((f"{name}, seed {seed}", original, calibrated, trained, gains[-1]))
            what = f"{name}: points of qat above static, mean of {len(gains)} seeds"
            bars.append(bar(what, statistics.fmean(gains), 0, at_least=True))
            kept[name] = {"gains": gains}
    table("qat against static, accuracy of the artifact", ("", "float", "static", "qat", "points"), rows)
    keep("quantize_qat", asked.seeds[0], asked.quick, began, {"bars": bars, "rows": rows, "ways": kept})


if __name__ == "__main__":
    main()
