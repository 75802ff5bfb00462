"""Architecture search on handwritten digits, with latency measured here. `python examples/digits_space.py`, or

omgoptim search digits_space.py:space --data digits_cnn.py:load --target-latency-ms 0.5 --trials 24 --epochs 18
omgoptim search digits_cnn.py:build --space digits_space.py:space --data digits_cnn.py:load --target-speedup 3
"""

import sys
from pathlib import Path
from typing import Any

from torch import nn

import omgoptim
from omgoptim.blocks import DepthSeparableConv

MODEL, DATA = "digits_cnn.py:build", "digits_cnn.py:load"
HERE = str(Path(__file__).parent)


def convolution(kind: str, c_in: int, c_out: int, stride: int = 1) -> nn.Module:
    if kind == "depth-separable":
        layer: nn.Module = DepthSeparableConv(c_in, c_out, 3, stride=stride, padding=1, bias=False)
    else:
        layer = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())


def space(trial: Any) -> nn.Module:
    """Return one of 1,296 networks: width, depth and type of convolution of three stages."""
    layers, channels = [], 1
    for stage, widths in enumerate(([8, 12, 16], [16, 24, 32], [32, 48, 64])):
        width = trial.suggest_categorical(f"width {stage}", widths)
        kind = trial.suggest_categorical(f"kind {stage}", ["full", "depth-separable"]) if stage else "full"
        layers.append(convolution(kind, channels, width, stride=2))
        layers += [
            convolution(kind, width, width) for _ in range(trial.suggest_int(f"depth {stage}", 0, 1 + stage // 2))
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def main(trials: int = 24, epochs: int = 18, timing: str = "standard", **more: Any) -> omgoptim.EfficiencyReport:
    given = {"data": DATA, "project": HERE, "timing": timing, "max_quality_drop": 0.05, "target_speedup": 3.0}
    report = omgoptim.search(MODEL, "digits_space.py:space", trials=trials, epochs=epochs, **given | more)
    print(report.summary)
    return report


if __name__ == "__main__":
    main(*(int(number) for number in sys.argv[1:]))
