"""The pieces that the sections of the markdown report are made of."""

from __future__ import annotations

from omgoptim.render import facts


def safe(text: str, limit: int = 200) -> str:
    """Bounded text on one line that cannot close a code span."""
    return facts.plain(text, limit).replace("`", "'")


def bulleted(title: str, lines: list[str], most: int) -> list[str]:
    """A list under its title, of many lines the first ones."""
    if not lines:
        return []
    more = [f"- … {len(lines) - most} more in report.json"] if len(lines) > most else []
    return [f"{title}:", *(f"- {line}" for line in lines[:most]), *more]
