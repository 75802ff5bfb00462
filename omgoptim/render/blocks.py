"""Typed blocks of a report's sections, and the drawings among them; each writer turns them into its own form.

A section says what is shown; `terminal.py`, `markdown.py` and `html.py` say how. `view/report.js` draws a drawing.
Texts are unescaped: the writers bound and escape them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from omgoptim.render.claims import Tone

PointKind = Literal["point", "kept", "outside", "original"]


@dataclass(frozen=True, slots=True)
class ScatterPoint:
    """A point of a scatter."""

    x: float
    y: float
    kind: PointKind
    label: str
    """Number or word beside it."""
    text: str
    """Tooltip."""
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
    points: tuple[ScatterPoint, ...]
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
    """Tooltip."""
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
    """A small curve: pairs of amount and drop in quality."""

    name: str
    points: tuple[tuple[float, float], ...]
    text: str
    over: bool = False
    """True if its largest drop is above the guard."""


@dataclass(frozen=True, slots=True)
class Multiples:
    """Small curves on the same scales."""

    title: str
    cells: tuple[Cell, ...]
    guard: float | None = None


LayerKind = Literal["integer", "stored", "float", "left"]
"""Computed in integers; stored in fewer bits; kept in float; unchanged."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Layers in order, each as wide as its share of the bytes: name, bytes and kind."""

    title: str
    layers: tuple[tuple[str, int, LayerKind], ...]


@dataclass(frozen=True, slots=True)
class Link:
    """A step of a chain."""

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


Mark = Literal["", "chosen", "faded"]
"""Emphasis of a row."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text on one line."""

    text: str
    tone: Tone = "same"
    code: bool = False
    """A path, a name or a command, which is shown character by character."""
    limit: int = 400
    """Characters that are shown of it."""


@dataclass(frozen=True, slots=True)
class Column:
    """The header of a column."""

    name: str
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of one row."""

    cells: tuple[Text, ...]
    mark: Mark = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headers."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    note: str = ""
    left_out: int = 0
    """Rows that a short form leaves out."""
    folded: bool = False
    """True to collapse it on the page."""


@dataclass(frozen=True, slots=True)
class Line:
    """A labelled line; an empty label continues the line before it. `head` is a verdict before the text."""

    label: str
    text: Text
    head: Text | None = None


@dataclass(frozen=True, slots=True)
class Items:
    """A list of texts."""

    title: str
    items: tuple[Text, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture, shown by the page only; `note` is its legend."""

    drawing: Drawing
    note: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """A command or code; only the page shows it. Folded, it is behind its title."""

    text: str
    title: str = ""
    folded: bool = False
    ask: str = ""
    """Message to the assistant behind its button; only a page in a chat has one."""


Block = Table | Line | Items | Chart | Code


def charts(*drawings: Drawing | None, note: str = "") -> tuple[Chart, ...]:
    """Return the charts of the drawings that exist."""
    return tuple(Chart(drawing, note) for drawing in drawings if drawing is not None)


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of a report."""

    title: str
    blocks: tuple[Block, ...]
    note: str = ""
    kind: str = ""
    """Its class in the page's style sheet."""


Columns = Mapping[str, Sequence[str | Text]]
"""Header to cells, all of one length."""


def cells_of(
    columns: Columns, numeric: Sequence[str] = (), marks: Sequence[Mark] = ()
) -> tuple[tuple[Column, ...], tuple[Row, ...]]:
    """Return the headers and rows of a table from its columns; a column that is empty in every row is left out.

    Args:
        columns: header to cells.
        numeric: headers of the columns that hold numbers.
        marks: emphasis of each row; empty for none.
    """
    cells = {name: [_text(cell) for cell in column] for name, column in columns.items()}
    shown = {name: column for name, column in cells.items() if any(cell.text for cell in column)}
    count = len(next(iter(cells.values()), []))
    rows = (Row(tuple(column[i] for column in shown.values()), marks[i] if marks else "") for i in range(count))
    return tuple(Column(name, name in numeric) for name in shown), tuple(rows)


def _text(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell
