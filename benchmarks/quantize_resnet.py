"""R8(24) on MNIST-5k, as a user's project would hold it: one case of benchmarks/quantize.py. Trained where it lies."""

from pathlib import Path

import torch
from pruning_nets import LEARNING_RATE, R8, digits, train
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

WEIGHTS = Path(__file__).with_suffix(".safetensors")
CALIBRATION, EVAL = slice(0, 297), slice(297, 2297)
"""Of the 3000 images that training does not see; as many calibrate as in the examples."""


def build() -> nn.Module:
    net = R8(24)
    if WEIGHTS.exists():
        net.load_state_dict(load_file(WEIGHTS))
    else:
        torch.manual_seed(0)
        save_file(train(R8(24), digits(), epochs=8, peak=LEARNING_RATE, seed=0).state_dict(), WEIGHTS)
        return build()
    return net.eval()


def load(split: str) -> TensorDataset:
    data = digits()
    if split == "train":
        return TensorDataset(data.train_images, data.train_labels)
    rows = CALIBRATION if split == "calibration" else EVAL
    return TensorDataset(data.test_images[rows], data.test_labels[rows])
