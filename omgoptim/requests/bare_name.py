"""A technique's bare name stands for its defaults."""

from __future__ import annotations

from collections.abc import Callable


def bare_name(key: str) -> Callable[[object], object]:
    """A validator that turns `"static"` into `{key: "static"}` and leaves anything else alone."""

    def expand(value: object) -> object:
        return {key: value} if isinstance(value, str) else value

    return expand
