"""Validation of ratios of a cost before over after: above 1."""

from __future__ import annotations


def before_over_after(value: object) -> object:
    """Return a ratio; refuse a fraction below 1 with the likely meaning, for a `BeforeValidator`.

    Raises:
        ValueError: a number in 0..1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if not 0 < number <= 1:
        return value
    meant = f"; to leave {number:.3g} of it, give {1 / number:.3g}" if number < 1 else ""
    raise ValueError(f"the ratio is before / after, and so above 1{meant}")
