"""A document as a self-contained page: data, script and style inline, no external resources, all text escaped."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

from omgoptim.render.blocks import Code, Items, Table
from omgoptim.render.document import Document, document_json, report_document
from omgoptim.render.numbers import plain
from omgoptim.reports import EfficiencyReport

if TYPE_CHECKING:
    from jinja2 import Environment


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
    digest = base64.b64encode(hashlib.sha256(_source("report.js").encode()).digest()).decode()
    return _page("page", f"'sha256-{digest}'", title, document)


@cache
def app_html() -> str:
    """Return the page without data: a host of a chat gives it the answer of a tool."""
    return _page("app", "'unsafe-inline'", "omgoptim report")


def _page(kind: str, scripts: str, title: str, document: Document | None = None) -> str:
    from markupsafe import Markup

    return (
        _environment()
        .get_template("report.html")
        .render(
            kind=kind,
            scripts=Markup(scripts),
            title=title,
            document=document,
            data=Markup(document_json(document)) if document else "",
            style=Markup(_source("report.css")),
            script=Markup(_source("report.js")),
        )
    )


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader

    kinds = {"items": Items, "code": Code, "table": Table}
    loader = PackageLoader("omgoptim.render", "view")
    environment = Environment(loader=loader, autoescape=True, finalize=_bounded)
    environment.tests.update({name: lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()})
    return environment


def _bounded(value: Any) -> Any:
    """Text of a model, a log or a library, bounded; it is escaped afterwards."""
    return plain(value, 1200) if type(value) is str else value


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
