"""Permitted order of the techniques in a chain."""

from __future__ import annotations

ORDER = ("search", "distill", "prune", "factorize", "quantize")
"""Weaker perturbations come first, and what fixes the numbers comes last: structure cannot be changed in integers."""

FORBIDDEN = {
    "quantize": "the layers of a quantized program are fixed: quantize last",
}
"""Techniques that must come last, with the reason."""


def refusal(before: str, after: str) -> str | None:
    """Return why `after` may not follow `before`; None where it may.

    Args:
        before: verb of the step that was done.
        after: verb of the step that would follow.
    """
    if before in FORBIDDEN:
        return FORBIDDEN[before]
    if ORDER.index(after) < ORDER.index(before):
        return f"{after} comes before {before}: it changes more, and what {before} fitted would be lost"
    return None
