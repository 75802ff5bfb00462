"""The pieces that every markdown form is made of: foreign text as text or as a code span, never as a mark."""

from __future__ import annotations

import re

from omgoptim.text import clean, clean_exact, clip

_MARKS = re.compile(
    r"[*~$|\\]"  # emphasis, strikethrough, a fence, mathematics, a table, an escape
    r"|<(?=[A-Za-z/!?])|&(?=#|\w+;)"  # a tag, an entity
    r"|\](?=[(:\[])|\[.*\]$|\[\^"  # an address of a link, its definition (the colon may be ours), a footnote
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; an underscore inside of a name is none
    r"|://|\bwww\.|\bmailto:|@[\w-]"  # what becomes a link or a mention by itself
    r"|#\d|\bGH-\d|(?<!\w)![0-9]|\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7,40}\b"  # issues and commits
    r"|:[a-z0-9_+-]+(?::|$)",  # an emoji, also with a colon of ours after it
    re.IGNORECASE,
)
"""What markdown, as GitHub and Hugging Face read it, would take for more than text."""
_OPENING = re.compile(r"[>=\[#]|[-+]+$|\d+[.)]$")
"""What opens a block at the beginning of a line: quote, heading, task, list, rule."""
_WORD = re.compile(r"\S+")


def safe(text: str, limit: int = 200) -> str:
    """Bounded text on one line outside of code spans, which may stand at its beginning."""
    words = _inert(text, limit)
    first, space, rest = words.partition(" ")
    return f"`{first}`{space}{rest}" if _OPENING.match(first) else words


def code(text: str, limit: int = 200) -> str:
    """Bounded text on one line as a code span, which it cannot close."""
    shown = clip(clean_exact(text), limit).replace("`", "'")
    return f"`{shown or ' '}`"


def cell(text: str, limit: int = 200) -> str:
    """`safe` text for a table."""
    return _inert(text.replace("|", "/"), limit)


def code_cell(text: str, limit: int = 200) -> str:
    """A code span for a table."""
    return code(text.replace("|", "/"), limit)


def _inert(text: str, limit: int) -> str:
    """Bounded text on one line in which a word that holds a mark of markdown is a code span."""
    shown = clean(text, limit).replace("`", "'")
    return _WORD.sub(lambda word: f"`{word[0]}`" if _MARKS.search(word[0]) else word[0], shown)
