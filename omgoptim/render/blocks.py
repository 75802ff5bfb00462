"""What a section of a report consists of: typed blocks, which each writer turns into its own form.

A section says what is shown; `terminal.py`, `markdown.py` and `html.py` say how. Texts are as they came: a writer
bounds and escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from omgoptim.render.claims import Tone
from omgoptim.render.drawings import Drawing

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
    """A picture: only the page shows it. `note` says how to read it."""

    drawing: Drawing
    note: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """A command or code; only the page shows it. Folded, it is behind its title."""

    text: str
    title: str = ""
    folded: bool = False
    ask: str = ""
    """The message that asks an assistant to do it; only a page in a chat has a button for it."""


Block = Table | Line | Items | Chart | Code


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


def table_of(
    columns: Columns,
    *,
    numeric: Sequence[str] = (),
    marks: Sequence[Mark] = (),
    title: str = "",
    note: str = "",
    left_out: int = 0,
    folded: bool = False,
) -> Table:
    """Return a table from its columns; a column that is empty in every row is left out.

    Args:
        columns: header to cells.
        numeric: headers of the columns that hold numbers.
        marks: one for each row; none stands out where it is empty.
        title: above the table.
        note: below the table.
        left_out: rows that were cut.
        folded: whether a page shows it closed at first.
    """
    cells = {name: [_text(cell) for cell in column] for name, column in columns.items()}
    shown = {name: column for name, column in cells.items() if any(cell.text for cell in column)}
    count = len(next(iter(cells.values()), []))
    rows = tuple(
        Row(tuple(column[index] for column in shown.values()), marks[index] if marks else "") for index in range(count)
    )
    headers = tuple(Column(name, name in numeric) for name in shown)
    return Table(headers, rows, title, note, left_out, folded)


def _text(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell
