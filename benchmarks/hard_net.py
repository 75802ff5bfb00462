"""A network that plain int8 ruins, and what accurate static quantization recovers of it, beside the peers' own calls.

A MobileNet-style network (depthwise-separable convolutions, batch norm, ReLU) reads silhouettes of ten animals
(animal-mnist, exact duplicates dropped). After training, the channels between two layers are spread by an exactly
equivalent rescale, as the channels of many pretrained mobile networks are: the batch norm of a layer is multiplied by
factors, one a channel and log-uniform, and the weights that read it are divided by them. The float function stays.

`build` and `load` are what a user would give. animal-mnist is needed: pip install --no-deps animal-mnist==0.4

    python benchmarks/hard_net.py [--seed 0] [--spread 16] [--only "omgoptim best"]
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from static_peers import OTHERS, OURS, PEERS, outputs, sqnr_db  # beside this file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import InputTensor, Signature, structure_of

ROWS = {"train": slice(0, 5000), "calibration": slice(5000, 5256), "eval": slice(5256, None)}
"""Rows of the deduplicated images after one permutation; nothing but the final numbers is read off `eval`."""

EPOCHS, BATCH, RATE, SHIFT = 18, 64, 4e-3, 2
SPREAD = 16.0
"""Factors are log-uniform between 1 / SPREAD and SPREAD."""

SHAPES = ((16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
"""Input channels, output channels and stride of each separable block."""


class Block(nn.Sequential):
    """Depthwise 3x3 and pointwise 1x1 convolution, each with batch norm and ReLU."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__(
            nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False), nn.BatchNorm2d(inside), nn.ReLU(),
            nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
        )  # fmt: skip


class HardNet(nn.Module):
    """Images (N, 1, 28, 28) in 0..1 to scores of 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(*shape) for shape in SHAPES))
        self.head = nn.Linear(SHAPES[-1][1], 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


def weights_file(seed: int = 0) -> Path:
    """Where the trained weights are kept: OMGOPTIM_HARD_NET names the folder, else `build/hard-net` has them."""
    folder = os.environ.get("OMGOPTIM_HARD_NET", Path(__file__).resolve().parent.parent / "build" / "hard-net")
    return Path(folder) / f"hard_net_{seed}.pt"


def build(seed: int = 0, spread: float = SPREAD) -> nn.Module:
    """The trained network with its channels spread; trained the first time, then read from `weights_file`."""
    model = HardNet()
    path = weights_file(seed)
    if not path.exists():
        train(model, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    spread_channels(model, spread, seed)
    return model.eval()


def load(split: str) -> TensorDataset:
    """Images and labels of a split: train, calibration or eval."""
    from distill_data import _unpickled, located  # beside this file

    folder = located("animal_mnist", "animal-mnist==0.4") / "data" / "Animal_MNIST"
    images, labels = (_unpickled(folder / f"animal_{what}_version_3.gz") for what in ("data", "label"))
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    rows = np.sort(first)[np.random.default_rng(0).permutation(len(first))][ROWS[split]]
    pixels = torch.from_numpy(images[rows].astype(np.float32) / 255)
    return TensorDataset(pixels[:, None], torch.from_numpy(labels[rows].astype(np.int64)))


def train(model: nn.Module, seed: int) -> None:
    """AdamW, one cycle, images shifted and mirrored at random."""
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    data = DataLoader(load("train"), BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * len(data))
    model.train()
    for epoch in range(EPOCHS):
        began, total = time.perf_counter(), 0.0
        for images, labels in data:
            padded = F.pad(images, (SHIFT,) * 4)
            top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
            moved = padded[:, :, top : top + 28, left : left + 28]
            moved = torch.where(torch.rand(len(moved), 1, 1, 1) < 0.5, moved.flip(3), moved)
            loss = F.cross_entropy(model(moved), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / len(data):.3f}, {time.perf_counter() - began:.1f} s", flush=True)
    model.eval()


@torch.no_grad()
def spread_channels(model: HardNet, spread: float, seed: int) -> None:
    """Multiply each hidden channel by a factor of its own and divide it out in the layer that reads it, in place."""
    generator = torch.Generator().manual_seed(1000 + seed)
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    for norm, reader in itertools.pairwise(layers):
        if isinstance(norm, nn.BatchNorm2d) and isinstance(reader, (nn.Conv2d, nn.Linear)):
            factors = spread ** (2 * torch.rand(norm.num_features, generator=generator) - 1)
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            depthwise = isinstance(reader, nn.Conv2d) and reader.groups > 1
            shape = (-1, 1) if depthwise else (1, -1)
            reader.weight.div_(factors.reshape(*shape, *(1,) * (reader.weight.ndim - 2)))


def export(path: Path, seed: int, spread: float) -> None:
    model = build(seed, spread)
    image = load("calibration").tensors[0][:2]
    signature = Signature((InputTensor("x", "float32", ("batch", 1, 28, 28), False),), structure_of(model(image)))
    export_onnx(model, {"x": image}, signature, path)


def batches_of(split: str, size: int = 32) -> list[dict[str, NDArray[Any]]]:
    images = load(split).tensors[0].numpy()
    return [{"x": images[start : start + size]} for start in range(0, len(images), size)]


BARS = {"omgoptim balanced": 0.8, "omgoptim best": 0.9}
"""Least share of what the best peer's default loses that an effort recovers."""


def measure(seed: int, spread: float, names: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Accuracy on the eval split and SQNR of the scores, each read off the file that a call wrote."""
    images, labels = (tensor.numpy() for tensor in load("eval").tensors)
    calibration = batches_of("calibration")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "float.onnx"
        export(source, seed, spread)
        want = outputs(source, images)
        results["float"] = {"accuracy": float((want.argmax(1) == labels).mean())}
        for index, (name, write) in enumerate({**PEERS, **OTHERS, **OURS}.items()):
            if names is not None and name not in names:
                continue
            target = Path(scratch) / f"{index}.onnx"
            began = time.perf_counter()
            write(source, target, calibration)
            got = outputs(target, images)
            results[name] = {
                "accuracy": float((got.argmax(1) == labels).mean()),
                "agreement": float((got.argmax(1) == want.argmax(1)).mean()),
                "sqnr_db": sqnr_db(want, got),
                "size_bytes": target.stat().st_size,
                "seconds": time.perf_counter() - began,
            }
    best = max(results[name]["accuracy"] for name in PEERS if name in results) if results.keys() & PEERS.keys() else 0.0
    for name in results.keys() & OURS.keys():
        lost, left = results["float"]["accuracy"] - best, results["float"]["accuracy"] - results[name]["accuracy"]
        results[name]["recovered"] = 1 - left / lost if lost > 0 else 1.0
    return results


def main() -> None:
    from record import bar, keep, machine, table  # beside this file

    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=SPREAD)
    parser.add_argument("--only", nargs="*", help="names of rows, to look at these alone")
    options = parser.parse_args()
    began = machine()
    results = measure(options.seed, options.spread, options.only)
    columns = ("accuracy", "agreement", "sqnr_db", "recovered", "size_bytes", "seconds")
    images = len(load("eval"))
    table(
        f"hard_net, spread {options.spread:g}, {images} images, files run by ONNX Runtime",
        ("", *columns),
        [(name, *(row.get(column, "") for column in columns)) for name, row in results.items()],
    )
    if options.only is None:
        bars = [
            bar(f"{name} recovers", results[name]["recovered"], limit, at_least=True) for name, limit in BARS.items()
        ]
        keep("hard_net", options.seed, False, began, {"spread": options.spread, "rows": results, "bars": bars})


if __name__ == "__main__":
    main()
