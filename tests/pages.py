"""Content of a page, read back from its data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from omgoptim.render.html import report_html
from omgoptim.reports import EfficiencyReport

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def document_of(page: str) -> Any:
    """The data of a page."""
    (text,) = DATA.findall(page)
    return json.loads(text)


def page_text(report: EfficiencyReport) -> str:
    """Every text of a report's page, a line each."""
    return "\n".join(_texts(document_of(report_html(report))))


def blocks_of(report: EfficiencyReport, section: str) -> list[Any]:
    """The blocks of a section by its title; empty where there is none."""
    found = [one["blocks"] for one in document_of(report_html(report))["sections"] if one["title"] == section]
    return found[0] if found else []


def drawings_of(report: EfficiencyReport, kind: str) -> list[Any]:
    """The drawings of a kind, wherever they are."""
    sections = document_of(report_html(report))["sections"]
    drawings = [block["drawing"] for section in sections for block in section["blocks"] if block["type"] == "chart"]
    return [drawing for drawing in drawings if drawing["type"] == kind]


def tones_of(report: EfficiencyReport) -> set[str]:
    """The tones of everything on the page."""
    return set(_values(document_of(report_html(report)), "tone"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)


def _values(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict) and name in value:
        yield value[name]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _values(item, name)
