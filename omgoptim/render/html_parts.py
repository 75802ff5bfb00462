"""The pieces that the sections of the HTML report are made of."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from omgoptim.render import facts


def text(value: str, limit: int = 400) -> str:
    """Text of a model, a log or a library, bounded and escaped."""
    return escape(facts.plain(value, limit))


def section(title: str, body: str, note: str = "", kind: str = "") -> str:
    """A card with its title; the arguments are HTML."""
    small = f" <small>{note}</small>" if note else ""
    return f'<section class="{kind}"><h2>{title}{small}</h2>{body}</section>'


def table(header: Iterable[tuple[str, bool]], rows: Iterable[str]) -> str:
    """A table from rows that are HTML; a header is a name and whether its column holds numbers."""
    head = "".join(f'<th class="{"n" if number else ""}">{name}</th>' for name, number in header)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
