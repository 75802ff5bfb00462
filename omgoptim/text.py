r"""Text of foreign origin made safe to show: names, messages and logs of models, data sets and libraries.

Whatever a model, a file or a library calls something passes through `clean` (or one of its forms below) before it
stands in an error, a report, a state or an answer. What comes out holds no control, escape, bidirectional or
zero-width character and is bounded; a character that cannot be seen is written out, as `\u202e`.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

LONGEST_LINE = 2_000
"""Maximum characters of one line of a report or an error."""

LONGEST_COMMAND = 10_000
"""Maximum characters of a command, a path or an argument, which are kept unchanged or not at all."""

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-9;:?<=>]*[ -/]*[@-~]"  # colours and cursor moves
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles, hyperlinks
)
_UNUSUAL = re.compile("[^ -~]")
"""Characters other than visible ASCII, which are examined one by one."""
_IGNORED = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Letters and marks without a visible form, which Python calls printable."""


def clean(text: str, limit: int = LONGEST_LINE) -> str:
    """Return `text` as one line of at most `limit` visible characters, spaces collapsed; cut in its middle."""
    if _is_plain(text, limit) and "  " not in text and text == text.strip():
        return text
    return clip(" ".join(_visible(text, limit, breaks=" ").split()), limit)


def clean_block(text: str, limit: int = LONGEST_LINE) -> str:
    """Like `clean`, but line breaks, tabs and indentation stay: for logs and code."""
    whole = _visible(text.replace("\r\n", "\n"), limit, breaks="\n")
    return clip("\n".join(line.rstrip() for line in whole.splitlines()), limit)


def clean_exact(text: str) -> str:
    """Return one line without any visible change: for commands, paths and arguments."""
    if _is_plain(text, LONGEST_COMMAND):
        return text
    return clip(_visible(text, LONGEST_COMMAND, breaks=" "), LONGEST_COMMAND)


def clean_json(value: Any, multiline: tuple[str, ...] = ()) -> Any:
    """Return a JSON value with every text and name `clean_exact`, or `clean_block` under the keys `multiline`."""
    if isinstance(value, str):
        return clean_exact(value)
    if isinstance(value, dict):
        return {
            clean_exact(str(key)): clean_block(item) if key in multiline and isinstance(item, str) else
            clean_json(item, multiline)
            for key, item in value.items()
        }  # fmt: skip
    return [clean_json(item, multiline) for item in value] if isinstance(value, (list, tuple)) else value


def clip(text: str, limit: int) -> str:
    """Return `text` cut to `limit` characters in its middle: its beginning and end matter most."""
    if len(text) <= limit:
        return text
    tail = max(1, limit // 3)
    return f"{text[: max(1, limit - tail - 1)].rstrip()}…{text[-tail:].lstrip()}"


def plural(count: int, thing: str) -> str:
    """Return `1 layer`, `3 layers`."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def hidden_character(text: str) -> str | None:
    """Return the first invisible character of `text`, as `U+202E`; None if there is none."""
    if text.isascii() and text.isprintable():
        return None
    return next((f"U+{ord(char):04X}" for char in text if not _is_space(char) and _is_hidden(char)), None)


def _visible(text: str, limit: int, breaks: str) -> str:
    """Return `text` without terminal escapes, each other hidden character escaped, each line break as `breaks`."""
    if len(text) > 12 * limit:  # bounds the work; escapes that are removed may shorten what is left
        text = clip(text, 12 * limit)
    return _UNUSUAL.sub(lambda match: _shown(match[0], breaks), _ESCAPES.sub("", text))


def _shown(char: str, breaks: str) -> str:
    if char in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029":
        return breaks if char != "\r" or breaks == " " else "\\r"
    if char == "\t" and breaks == "\n":
        return char
    if _is_space(char) or char == "\t":
        return " "
    return char.encode("unicode_escape").decode() if _is_hidden(char) else char


def _is_plain(text: str, limit: int) -> bool:
    return len(text) <= limit and text.isascii() and text.isprintable()


def _is_space(char: str) -> bool:
    return unicodedata.category(char) == "Zs"


def _is_hidden(char: str) -> bool:
    return not char.isprintable() or _IGNORED.match(char) is not None
