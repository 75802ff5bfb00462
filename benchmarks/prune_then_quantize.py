"""What an engineer would script: Torch-Pruning at three ratios, fine-tuning, NNCF; the ratio chosen on held-out data.

    python benchmarks/prune_then_quantize.py EXAMPLE.py FOLDER --seconds 300 --guard 0.01

Writes FOLDER/model.onnx and FOLDER/chosen.json. The evaluation split is not read.
"""

from __future__ import annotations

import argparse
import copy
import json
import runpy
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from static_peers import nncf_default
from torch import nn
from torch.utils.data import DataLoader, Dataset

RATIOS = (0.2, 0.35, 0.5)
MOST_EPOCHS = 40
"""As for `optimize`."""

INPUT = "input"
"""Name of the argument of `nn.Sequential.forward`, as in the model's signature."""

Data = tuple[NDArray[np.float32], NDArray[np.int64]]


def pruned(net: nn.Module, ratio: float, example: torch.Tensor) -> nn.Module:
    """Torch-Pruning's group magnitude, as its documentation has it."""
    import torch_pruning

    smaller = copy.deepcopy(net)
    last = [layer for layer in smaller.modules() if isinstance(layer, nn.Linear)][-1]
    torch_pruning.pruner.BasePruner(
        smaller,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last],
    ).step()
    return smaller


def fine_tuned(net: nn.Module, train: Dataset[Any], seconds: float, seed: int) -> tuple[nn.Module, int]:
    """AdamW with one cycle, for as many epochs as the time allows by what the first one takes."""
    torch.manual_seed(seed)
    batches = DataLoader(train, batch_size=64, shuffle=True)
    began = time.perf_counter()
    _epochs(copy.deepcopy(net), batches, 1)
    epochs = int(min(MOST_EPOCHS, max(1, seconds / (time.perf_counter() - began) - 1)))
    return _epochs(net, batches, epochs), epochs


def _epochs(net: nn.Module, batches: DataLoader[Any], epochs: int) -> nn.Module:
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, epochs * len(batches))
    for _ in range(epochs):
        for images, target in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), target).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def quantized(net: nn.Module, folder: Path, calibration: NDArray[np.float32]) -> Path:
    """Export the net and quantize it with NNCF's defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "float.onnx", folder / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = torch.from_numpy(calibration[:2])
    torch.onnx.export(
        net, (example,), str(source), input_names=[INPUT], dynamo=True, dynamic_shapes=({0: batch},),
        external_data=False, verbose=False,
    )  # fmt: skip
    nncf_default(
        source, target, [{INPUT: rows} for rows in np.array_split(calibration, max(1, len(calibration) // 32))]
    )
    return target


def accuracy(program: Path, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])
    scores = session.run(None, {INPUT: images})[0]
    return float((np.asarray(scores).argmax(1) == labels).mean())


def arrays(data: Dataset[Any]) -> Data:
    images, labels = zip(*data, strict=True)  # type: ignore[call-overload]
    return torch.stack(images).numpy(), torch.stack(labels).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("example", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--guard", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    example = runpy.run_path(str(asked.example))
    net: nn.Module = example["build"]()
    images, labels = arrays(example["load"]("calibration"))
    half = len(images) // 2
    with torch.inference_mode():
        before = float((net(torch.from_numpy(images[half:])).argmax(1).numpy() == labels[half:]).mean())
    tried = []
    for ratio in RATIOS:
        smaller = pruned(net, ratio, torch.from_numpy(images[:1]))
        smaller, epochs = fine_tuned(smaller, example["load"]("train"), asked.seconds / len(RATIOS), asked.seed)
        program = quantized(smaller, asked.folder / f"ratio{ratio}", images[:half])
        drop = before - accuracy(program, images[half:], labels[half:])
        tried.append({"ratio": ratio, "epochs": epochs, "selection_drop": drop, "program": str(program)})
    within = [one for one in tried if one["selection_drop"] <= asked.guard]
    chosen = within[-1] if within else min(tried, key=lambda one: one["selection_drop"])
    (asked.folder / "model.onnx").write_bytes(Path(chosen["program"]).read_bytes())
    (asked.folder / "chosen.json").write_text(json.dumps({"chosen": chosen["ratio"], "tried": tried}, indent=1))


if __name__ == "__main__":
    main()
