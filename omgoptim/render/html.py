"""A document as a self-contained page: data, script and style inline, no external resources, all text inert."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from html import escape
from importlib.resources import files

from omgoptim.render.blocks import Code, Items, Section, Table
from omgoptim.render.document import Document, document_json, report_document
from omgoptim.render.numbers import plain
from omgoptim.reports import EfficiencyReport

_WITHOUT_SCRIPT = ("warnings", "comparison", "next")
"""Kinds of sections that a page without scripts has too."""
_SLOT = re.compile(r"\{\{([a-z]+)\}\}")


def report_html(report: EfficiencyReport) -> str:
    """Return the page of a finished run."""
    return page_html(report_document(report), f"omgoptim {report.verb}")


def page_html(document: Document, name: str) -> str:
    """Return the page of a document: works offline, and without scripts it still says the verdict.

    Args:
        document: what the page shows.
        name: stands before the verdict in the page's title.
    """
    title = f"{name}: {document.verdict.lower()}" if document.verdict else name
    digest = base64.b64encode(hashlib.sha256(_file("report.js").encode()).digest()).decode()
    data = f'<script type="application/json" id="data">{document_json(document)}</script>'
    return _page("page", f"'sha256-{digest}'", title, _without_script(document), data)


@cache
def app_html() -> str:
    """Return the page without data: a host of a chat gives it the answer of a tool."""
    return _page("app", "'unsafe-inline'", "omgoptim report", "", "")


def _page(kind: str, scripts: str, title: str, body: str, data: str) -> str:
    slots = {
        "kind": kind,
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}",
        "title": escape(plain(title)),
        "style": _file("report.css"),
        "body": body,
        "data": data,
        "script": _file("report.js"),
    }
    return _SLOT.sub(lambda found: slots[found[1]], _file("report.html"))


@cache
def _file(name: str) -> str:
    return (files("omgoptim.render") / "view" / name).read_text(encoding="utf-8")


def _without_script(document: Document) -> str:
    """Return the verdict, the warnings, the before / after table and the next steps as plain HTML."""
    head = f"<p><b>{_text(document.verdict)}</b></p><h1>{_text(document.title)}</h1><p>{_text(document.lead)}</p>"
    sections = [_section(section) for section in document.sections if section.kind in _WITHOUT_SCRIPT]
    return f"<noscript>{head}{''.join(sections)}<p>The whole report needs scripts.</p></noscript>"


def _section(section: Section) -> str:
    parts = []
    for block in section.blocks:
        if isinstance(block, Items):
            parts.append(f"<ul>{''.join(f'<li>{_text(item.text)}</li>' for item in block.items[:20])}</ul>")
        elif isinstance(block, Code):
            parts.append(f"<p>{_text(block.title)}</p><pre>{_text(block.text)}</pre>")
        elif isinstance(block, Table):
            head = "".join(f"<th>{_text(column.name)}</th>" for column in block.columns)
            rows = (f"<tr>{''.join(f'<td>{_text(c.text)}</td>' for c in row.cells)}</tr>" for row in block.rows[:40])
            parts.append(f"<table><tr>{head}</tr>{''.join(rows)}</table>")
    return f"<section><h2>{_text(section.title)}</h2>{''.join(parts)}</section>"


def _text(value: str) -> str:
    """Text of a model, a log or a library, bounded and escaped."""
    return escape(plain(value, 1200))
