"""Limits of raw arguments: bounded in size and depth, finite, and visible text."""

from __future__ import annotations

from typing import Any

from omgoptim.errors import RequestError
from omgoptim.text import clean, hidden_character

DEEPEST = 16
"""Maximum nesting of objects and lists. Chosen: requests have three levels; JSON readers stop at about a thousand."""
MAX_VALUES = 10_000
"""Maximum values in all arguments together, far above what a request needs, against memory exhaustion."""
MAX_TEXT_CHARACTERS = 4_096
"""Maximum characters of one text: the longest path of most systems."""
MAX_TOTAL_CHARACTERS = 100_000
"""Maximum characters of all texts together. Chosen: a request with long globs has a few thousand."""
MAX_INTEGER = 2**63 - 1
"""The largest integer of most JSON readers, and of torch's seeds."""


def refuse_unusable(arguments: dict[str, Any]) -> None:
    """Raise for arguments that no request can use: nested too deep, too many, too long, not finite, or not visible.

    A text with a control or invisible character is refused, so that a command which repeats the request is exact.

    Raises:
        RequestError: names the argument and what is wrong with it.
    """
    values = texts = 0
    left = [("", arguments, 0)] if isinstance(arguments, dict) else []
    while left:
        name, value, depth = left.pop()
        values += 1
        if depth > DEEPEST:
            raise RequestError(f"{_named(name)} is nested too deep", f"at most {DEEPEST} levels are read", "flatten it")
        if values > MAX_VALUES:
            raise RequestError(f"{_named(name)} holds too many values", f"at most {MAX_VALUES:,} are read")
        if isinstance(value, str):
            texts += len(value)
            _refuse_text(name, value, texts)
        elif isinstance(value, (int, float)):
            _refuse_number(name, value)
        elif isinstance(value, dict):
            for key, item in value.items():
                if depth == 0 and not isinstance(key, str):
                    raise RequestError(f"{shortened(key)} is not the name of an argument", "names are text")
                _refuse_text(name, str(key), texts, "a name in " if name else "the name of an argument, ")
                left.append((name or str(key), item, depth + 1))
        elif isinstance(value, (list, tuple)):
            left += [(name, item, depth + 1) for item in value]


def shortened(value: Any, limit: int = 80) -> str:
    """Return a received value for an error."""
    return clean(repr(value), limit)


def _refuse_text(name: str, text: str, texts: int, which: str = "") -> None:
    where = f"{which}{_named(name or text)}"
    if len(text) > MAX_TEXT_CHARACTERS or texts > MAX_TOTAL_CHARACTERS:
        received = (
            f"received {len(text):,} characters" if len(text) > MAX_TEXT_CHARACTERS else f"{texts:,} in all arguments"
        )
        raise RequestError(f"{where} is too long", f"at most {MAX_TEXT_CHARACTERS:,} characters are read; {received}")
    hidden = hidden_character(text)
    if hidden is not None:
        raise RequestError(
            f"{where} contains an invisible character",
            f"{hidden} in {shortened(text)}; names, paths and arguments are visible text on one line",
            "give it without that character; rename a file that has it",
        )


def _refuse_number(name: str, value: float) -> None:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        raise RequestError(f"{_named(name)} is not a number", f"received {value}", "give a finite number")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise RequestError(f"{_named(name)} is too large", f"whole numbers up to {MAX_INTEGER} are read")


def _named(name: str) -> str:
    return f"'{clean(name, 60)}'" if name else "the request"
