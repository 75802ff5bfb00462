"""A badge for a README: `omgoptim | 3.8x smaller, 2.9x faster`. It claims what the report claims, and no more."""

from __future__ import annotations

from html import escape

from omgoptim.render.claims import speed_claim, verdict
from omgoptim.render.numbers import size_text, time_text
from omgoptim.reports import EfficiencyReport, Gains
from omgoptim.reports.measured import SMALLER

NAME = "omgoptim"
_COLOURS = {"OK": "#2e7d32", "NO GAIN": "#8a6100", "GUARD FAILED": "#b3261e"}
_OTHER = "#44546a"
_LETTER, _MARGIN, _HEIGHT = 6.6, 8, 20
"""Mean width of a letter of 11 px, space beside a text, and height, in px."""


def badge_text(report: EfficiencyReport) -> str:
    """The claim of a badge: gains where the outcome is ok, else the verdict."""
    title = verdict(report)
    if title not in ("OK", "MEASURED"):
        return title.lower()
    gains = report.gains or Gains()
    claims = []
    if gains.size_ratio is not None and gains.size_ratio >= SMALLER:
        claims.append(f"{_ratio(gains.size_ratio)} smaller")
    if gains.speedup is not None and speed_claim(gains)[1] == "better":
        claims.append(f"{_ratio(gains.speedup)} faster")
    known = report.after or report.before
    if not claims and report.gains is None and known is not None:
        claims += [size_text(known.size_bytes)] if known.size_bytes is not None else []
        claims += [time_text(known.latency_ms_p50)] if known.latency_ms_p50 is not None else []
    return ", ".join(claims) or title.lower()


def badge_svg(report: EfficiencyReport) -> str:
    """The badge as an SVG that loads nothing; it holds no name of a model."""
    text = badge_text(report)
    left, right = (round(len(part) * _LETTER + 2 * _MARGIN) for part in (NAME, text))
    label, colour = escape(f"{NAME}: {text}"), _COLOURS.get(verdict(report), _OTHER)
    font = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="{_HEIGHT}" role="img" '
        f'aria-label="{label}"><title>{label}</title>'
        f'<clipPath id="r"><rect width="{left + right}" height="{_HEIGHT}" rx="3"/></clipPath>'
        f'<g clip-path="url(#r)"><rect width="{left}" height="{_HEIGHT}" fill="#333"/>'
        f'<rect x="{left}" width="{right}" height="{_HEIGHT}" fill="{colour}"/></g>'
        f'<g {font}><text x="{left / 2:g}" y="14">{NAME}</text>'
        f'<text x="{left + right / 2:g}" y="14">{escape(text)}</text></g></svg>\n'
    )


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1.1 else f"{ratio:.1f}x"
