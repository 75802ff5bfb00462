"""Bare names of techniques, which stand for their defaults."""

from __future__ import annotations

from collections.abc import Callable


def bare_name(key: str) -> Callable[[object], object]:
    """Return a validator that turns `"static"` into `{key: "static"}` and leaves anything else alone."""

    def expand(value: object) -> object:
        return {key: value} if isinstance(value, str) else value

    return expand
