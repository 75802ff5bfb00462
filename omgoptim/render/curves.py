"""The drawings of training and sensitivity: curves over epochs, and one small curve per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omgoptim.render.drawings import Cell, Curve, Curves, Multiples, Panel
from omgoptim.render.lists import Sensitivity
from omgoptim.render.numbers import amount_text, path_text
from omgoptim.reports import Epoch

MOST_LAYERS = 24
"""How many layers or groups get a curve of their own, the most sensitive first."""


def learning_curve(
    epochs: Sequence[Epoch], control: Sequence[Epoch], description: str, names: tuple[str, str]
) -> Curves | None:
    """Loss and quality over all epochs, a panel each. None below two epochs.

    Args:
        epochs: of the training.
        control: epochs of a second training, drawn on the same scales.
        description: what the picture says to those who cannot see it.
        names: of both trainings, for the legend.
    """
    both = [epochs, *([control] if control else [])]
    if max(len(each) for each in both) < 2:
        return None
    panels = []
    for name in ("loss", "quality"):
        curves = tuple(
            Curve(
                tuple(_finite(getattr(epoch, name)) for epoch in each),
                tuple(epoch.round for epoch in each),
                tuple(place for place, epoch in enumerate(each) if epoch.best),
                names[place] if len(both) > 1 else "",
                place == 1,
            )
            for place, each in enumerate(both)
        )
        if name == "loss" or any(value is not None for curve in curves for value in curve.values):
            panels.append(Panel(name, curves))
    title = "Loss and quality over the epochs" if len(panels) == 2 else "Loss over the epochs"
    title += ", with the teacher and without" if len(both) > 1 else ""
    x = "epoch, over all rounds" if len({epoch.round for epoch in epochs}) > 1 else "epoch"
    return Curves(title, description, x, tuple(panels))


def sensitivity_multiples(found: Sequence[Sensitivity], guard: float | None) -> Multiples | None:
    """One small curve per layer or group: the drop in quality against the amount, all on the same scales."""
    cells = tuple(_cell(one, guard) for one in found[:MOST_LAYERS] if one.points)
    return Multiples("Drop in quality against the amount, for each layer alone", cells, guard) if cells else None


def _cell(one: Sensitivity, guard: float | None) -> Cell:
    worst = one.worst
    return Cell(
        path_text(one.path, 200),
        ((0.0, 0.0), *((point.amount, point.quality_drop) for point in one.points)),
        f"{worst.quality_drop:.4f} at {amount_text(worst.amount)}",
        guard is not None and worst.quality_drop > guard,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
