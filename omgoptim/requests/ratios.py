"""Ratios of a cost before over after: above 1, and refused with what was likely meant where they are not."""

from __future__ import annotations


def before_over_after(value: object) -> object:
    """Pass a ratio on; refuse a fraction that is to be left, for a `BeforeValidator`.

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
