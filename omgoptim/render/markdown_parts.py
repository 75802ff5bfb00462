"""The pieces that the sections of the markdown report are made of."""

from __future__ import annotations

import re

from omgoptim.text import clean, clean_exact, clip

_OPENS = re.compile(r"<(?=[A-Za-z/!?])|\](?=[(:])")
"""What begins a tag, the address of a link or the definition of one, unless a space follows it."""
_ADDRESS = re.compile(r"(?:(?<![A-Za-z])[A-Za-z][\w+.-]*://|(?<![A-Za-z0-9])www\.)\S+|\b[\w.+-]+@[\w-]+\.[\w.-]+")
"""What is made a link without any marks, also after a digit or an underscore."""
_ESCAPED = re.compile(r"\\(?=`)")
"""A backslash that would make the code span after it none."""


def safe(text: str, limit: int = 200) -> str:
    """Bounded text on one line outside of code spans: no tag, link or image, and no code span but around addresses."""
    shown = _OPENS.sub(r"\g<0> ", clean(text, limit).replace("`", "'"))
    return _ESCAPED.sub(r"\\ ", _ADDRESS.sub(r"`\g<0>`", shown))


def code(text: str, limit: int = 200) -> str:
    """Bounded text on one line as a code span, which it cannot close."""
    shown = clip(clean_exact(text), limit).replace("`", "'")
    return f"`{shown or ' '}`"


def cell(text: str, limit: int = 200) -> str:
    """`safe` text for a table."""
    return safe(text, limit).replace("|", "/")


def code_cell(text: str, limit: int = 200) -> str:
    """A code span for a table."""
    return code(text.replace("|", "/"), limit)
