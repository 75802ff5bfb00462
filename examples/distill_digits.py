"""Distill digits_cnn into a student with 1/50 of the parameters, then int8. `python examples/distill_digits.py`, or

omgoptim distill digits_cnn.py:build --student distill_digits.py:small --data digits_cnn.py:load --epochs 60 --control
"""

import sys
from pathlib import Path

from torch import nn

import omgoptim
from omgoptim.blocks import DepthSeparableConv

MODEL, DATA = "digits_cnn.py:build", "digits_cnn.py:load"
HERE = str(Path(__file__).parent)


def small() -> nn.Module:
    """Return a network with 4 k parameters: a stem and two depthwise separable convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        DepthSeparableConv(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        DepthSeparableConv(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def main(epochs: int = 60, timing: str = "standard") -> tuple[omgoptim.EfficiencyReport, omgoptim.EfficiencyReport]:
    given = {"data": DATA, "project": HERE, "timing": timing, "max_quality_drop": 0.05}
    distilled = omgoptim.distill(
        MODEL, "distill_digits.py:small", epochs=epochs, learning_rate=0.02, alpha=0.1, control=True, **given
    )
    print(distilled.summary)
    quantized = omgoptim.quantize(distilled.run_id, scheme="static", **given)
    print(quantized.summary)
    return distilled, quantized


if __name__ == "__main__":
    main(*(int(epochs) for epochs in sys.argv[1:]))
