"""Tests of report.html in a real browser: no error, no request, no overlap, no finding of axe-core."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pages import drawings_of

from omgoptim.render.html import report_html
from omgoptim.reports import Candidate, Change, Coverage, EfficiencyReport, LayerPrecision

REPORTS = Path(__file__).parents[1] / "render" / "reports"

HOSTILE = [
    "<script>globalThis.hit=1</script>",
    "</script><script>globalThis.hit=2</script>",
    "<img src=x onerror=globalThis.hit=3>",
    "<svg onload=globalThis.hit=4>",
    "<svg><script>globalThis.hit=5</script></svg>",
    "<iframe srcdoc='<script>parent.hit=6</script>'></iframe>",
    "<a href='javascript:globalThis.hit=7'>x</a>",
    "javascript:globalThis.hit=8",
    "\"><img src=x onerror=globalThis.hit=9>",
    "' onmouseover='globalThis.hit=10",
    "<style>*{display:none}</style>",
    "<base href='http://127.0.0.1:9/'>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<link rel=stylesheet href='http://127.0.0.1:9/x.css'>",
    "<!--x",
    "]]>",
    "<math><mi xlink:href='javascript:globalThis.hit=11'>x</mi></math>",
    "{{title}}${globalThis.hit=12}",
    "&lt;img src=x&gt;",
    "<template><img src=x></template>",
    "__proto__",
    "</title><script>globalThis.hit=13</script>",
    "<form action='http://127.0.0.1:9/'><input autofocus onfocus=globalThis.hit=14>",
]  # fmt: skip


def stored(name: str) -> EfficiencyReport:
    return EfficiencyReport.model_validate_json((REPORTS / f"{name}.json").read_text())


def written(folder: Path, name: str, report: EfficiencyReport) -> str:
    (folder / f"{name}.html").write_text(report_html(report), encoding="utf-8")
    return str(folder / f"{name}.html")


def large_report() -> EfficiencyReport:
    """200 candidates and 1,000 layers."""
    report = stored("quantized")
    candidates = [
        Candidate(
            name=f"static int8, variant {number}",
            scheme="static",
            runtime="onnxruntime",
            size_bytes=300_000 + number,
            speedup=1 + number / 50,
            quality=0.98 + number / 20_000,
            quality_drop=0.0071 - number / 20_000,
            status="chosen" if number == 7 else "dropped",
            why="slower than the chosen one on the same machine",
        )
        for number in range(200)
    ]
    layers = [
        LayerPrecision(path=f"encoder.layers.{number // 6}.block.{number % 6}.linear", op="MatMul", op_after="MatMul",
                       shape=[64, 64], dtype="float32", dtype_after="int8" if number % 9 else "float32", bytes=16_384,
                       bytes_after=4_096 if number % 9 else 16_384, computed_in="int8" if number % 9 else "float32")
        for number in range(1000)
    ]  # fmt: skip
    coverage = Coverage(verdict="REAL", why="most layers", changed=888, total=1000, weight_share=0.9, layers=layers)
    changed = [Change(path=layer.path, what="int8", before="float32", after="int8") for layer in layers]
    return report.model_copy(update={"candidates": candidates, "coverage": coverage, "changed": changed})


def clean(result: dict[str, Any]) -> None:
    assert result["errors"] == []
    assert result["requests"] == []
    assert result["hit"] is None
    assert result["foreign"] == []
    assert result["found"] == []
    assert result["printed"] == "rgb(255, 255, 255)"
    assert result["sorted"] in ("ascending", None)  # by the keyboard; None where no table can be sorted


def test_hostile_names_stay_text_in_a_page_without_errors_requests_or_overlaps(drive: Any, tmp_path: Path) -> None:
    report = stored("quantized")
    one = report.candidates[0]
    candidates = [one.model_copy(update={"name": text, "why": text, "status": "dropped"}) for text in HOSTILE]
    changed = [Change(path=text, what=text, before=text, after=text) for text in HOSTILE]
    update = {
        "candidates": candidates,
        "changed": changed,
        "warnings": HOSTILE,
        "summary": f"{HOSTILE[0]}. {HOSTILE[2]}",
    }
    file = written(tmp_path, "hostile", report.model_copy(update=update))
    (result,) = drive("page.mjs", {"pages": [file], "widths": [800], "themes": ["light"]})
    clean(result)
    assert result["sorted"] == "ascending"
    for text in HOSTILE:
        assert result["raw"].count(text) >= 2


@pytest.mark.slow
def test_every_page_is_whole_at_every_width_in_both_themes(drive: Any, tmp_path: Path) -> None:
    pages = [written(tmp_path, file.stem, stored(file.stem)) for file in sorted(REPORTS.glob("*.json"))]
    asked = {"pages": pages, "widths": [360, 800, 1400], "themes": ["light", "dark"]}
    results = drive("page.mjs", asked | {"pictures": os.environ.get("OMGOPTIM_PICTURES")})
    assert len(results) == 2 * len(pages)
    for result in results:
        clean(result)
        assert [table for table in result["cut"] if not table.startswith("360 px")] == []  # none has to be scrolled


@pytest.mark.slow
def test_two_hundred_candidates_and_a_thousand_layers_are_painted_at_once(drive: Any, tmp_path: Path) -> None:
    file = written(tmp_path, "large", large_report())
    assert Path(file).stat().st_size <= 200_000
    assert len(drawings_of(large_report(), "strip")[0]["layers"]) == 1000
    assert len(drawings_of(large_report(), "scatter")[0]["points"]) == 201
    asked = {"pages": [file] * 5, "widths": [1400], "themes": ["light"], "axe": False}
    results = drive("page.mjs", asked)
    for result in results:
        clean(result)
    assert min(result["paint"] for result in results) < 300  # ms: what the page promises, the best of five
