"""What a picture of the page shows, as typed data: `view/report.js` draws it.

Texts are as they came: the document that carries a drawing bounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PointKind = Literal["point", "kept", "outside", "original"]


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a scatter."""

    x: float
    y: float
    kind: PointKind
    label: str
    """Number or word beside it."""
    text: str
    """What it says when it is pointed at."""
    size: int | None = None
    """Bytes: the area of the point."""
    x_low: float | None = None
    x_high: float | None = None
    """Ends of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """Points over two axes; below `guard` the quality is too low."""

    title: str
    x: str
    y: str
    points: tuple[Point, ...]
    guard: float | None = None
    front: tuple[tuple[float, float], ...] = ()
    """Points of the Pareto front, from left to right."""
    original_ms: float | None = None
    """Latency at speedup 1, in ms: the axis then gives the latency of each speedup too."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A labelled bar; `expected` is a second, thinner one."""

    label: str
    value: float
    text: str
    whole: str = ""
    """What it says when it is pointed at."""
    expected: float | None = None
    faded: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars on one scale that begins at 0."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """A value for each epoch, None where there is no number."""

    values: tuple[float | None, ...]
    rounds: tuple[int, ...]
    """The round of each epoch: a line ends with its round."""
    kept: tuple[int, ...]
    """Places of the epochs whose weights were kept, from 0."""
    name: str = ""
    control: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves on one axis."""

    name: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """Panels over the same epochs."""

    title: str
    text: str
    x: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One small curve: pairs of amount and drop in quality."""

    name: str
    points: tuple[tuple[float, float], ...]
    text: str
    over: bool = False
    """Whether its worst drop is above the guard."""


@dataclass(frozen=True, slots=True)
class Multiples:
    """Small curves on the same scales."""

    title: str
    cells: tuple[Cell, ...]
    guard: float | None = None


LayerKind = Literal["integer", "stored", "float", "left"]
"""Computed in integers; stored in fewer bits; in float on purpose; left as it was."""


@dataclass(frozen=True, slots=True)
class Strip:
    """The layers in order, each as wide as its share of the bytes: name, bytes and kind."""

    title: str
    layers: tuple[tuple[str, int, LayerKind], ...]


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a chain."""

    name: str
    status: str
    kept: bool
    text: str
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Chain:
    """Steps in the order in which they were taken."""

    title: str
    links: tuple[Link, ...]


Drawing = Scatter | Bars | Curves | Multiples | Strip | Chain
