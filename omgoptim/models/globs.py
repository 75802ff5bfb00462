"""Globs on module paths, by which `targets` and `ignore` select layers. No torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence

from omgoptim.errors import NoLayerChanged, did_you_mean


def matches(glob: str, path: str) -> bool:
    """Return whether a glob matches a path or that of a module around it: `encoder` is all of the encoder."""
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:length]), glob) for length in range(1, len(parts) + 1))


def is_selected(paths: Iterable[str], targets: Sequence[str], ignore: Sequence[str]) -> bool:
    """Return whether `targets` (all, if empty) match one of the paths and `ignore` matches none."""
    paths = list(paths)
    targeted = not targets or any(matches(glob, path) for glob in targets for path in paths)
    return targeted and not any(matches(glob, path) for glob in ignore for path in paths)


def refuse_unknown(globs: Iterable[str], paths: Collection[str]) -> None:
    """Raise NoLayerChanged if a glob matches none of the paths."""
    for glob in globs:
        if not any(matches(glob, path) for path in paths):
            raise NoLayerChanged(f"'{glob}' matches no layer of this model", did_you_mean(glob, set(paths)))
