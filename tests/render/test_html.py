"""Tests of the page for a person: what its data says, and that nothing of a model becomes markup."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from pages import blocks_of, document_of, drawings_of, page_text

from omgoptim.render.document import LARGEST, document_json, report_document
from omgoptim.render.html import app_html, report_html
from omgoptim.reports import Change, EfficiencyReport

VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Tags in order, whether they nest, and what they load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize(
    "name", ["quantized", "explained", "profiled", "planned", "pruned", "factorized", "distilled", "hostile"]
)
def test_the_page_is_well_formed_loads_nothing_and_runs_only_its_own_script(
    name: str, request: pytest.FixtureRequest
) -> None:
    page = report_html(request.getfixturevalue(name))
    outline = Outline(page)
    assert outline.open == []
    assert outline.links == []
    assert outline.tags.count("script") == 2  # the data and the one that draws it
    assert {"link", "img", "iframe"}.isdisjoint(outline.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]+'\"", page)
    assert len(page.encode()) <= 200_000


def test_the_page_says_what_the_report_says(quantized: EfficiencyReport) -> None:
    text = page_text(quantized)
    for needed in ("OK", "5.79x", "3.76x", "faster (5.41 to 6.18)", "0.9833", "guard", *quantized.warnings):
        assert needed in text
    assert quantized.repeat in text
    assert quantized.next_steps[0].command in text


def test_without_scripts_the_page_says_the_verdict_the_warnings_the_table_and_the_next_step(
    quantized: EfficiencyReport,
) -> None:
    (rest,) = re.findall(r"<noscript>(.*?)</noscript>", report_html(quantized), re.DOTALL)
    for needed in ("<b>OK</b>", "5.79x faster", "<td>latency p50</td>", "<td>0.0712 ms</td>", quantized.warnings[0]):
        assert needed in rest
    assert f"<pre>{quantized.next_steps[0].command}</pre>" in unescape(rest)


def test_no_text_of_a_model_becomes_markup(hostile: EfficiencyReport) -> None:
    page = report_html(hostile)
    assert page.count("<script") == 2
    assert page.count("</title>") == 1
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_page_of_a_chat_has_no_data(quantized: EfficiencyReport) -> None:
    assert 'id="data">' not in app_html()
    assert len(app_html().encode()) <= 60_000


def test_the_page_of_a_very_large_model_is_bounded_and_says_what_it_leaves_out(quantized: EfficiencyReport) -> None:
    changes = [Change(path=f"layers.{n}.linear", what="int8", before="float32", after="int8") for n in range(20_000)]
    large = quantized.model_copy(update={"changed": changes})
    text = document_json(report_document(large))
    assert len(text.encode()) <= LARGEST
    table = blocks_of(large, "Layers")[0]
    assert table["left_out"] + len(table["rows"]) == 20_000
    assert "\\u003c" in document_json(report_document(quantized.model_copy(update={"summary": "a < b"})))
    assert json.loads(text)["title"] == document_of(report_html(large))["title"]


def test_the_chosen_candidate_is_marked_with_its_interval_and_one_below_the_guard_is_outside(
    quantized: EfficiencyReport,
) -> None:
    (scatter,) = drawings_of(quantized, "scatter")
    kinds = [point["kind"] for point in scatter["points"]]
    assert kinds == ["original", "kept", "point", "point", "point", "outside"]
    chosen = scatter["points"][1]
    assert (chosen["x_low"], chosen["x_high"]) == (5.41, 6.18)
    assert scatter["guard"] == pytest.approx(0.9771)
    assert scatter["front"] == [[4.4, 0.9871], [5.2, 0.9857], [5.8, 0.9843]]


def test_one_candidate_with_numbers_is_no_picture(quantized: EfficiencyReport) -> None:
    assert drawings_of(quantized.model_copy(update={"candidates": quantized.candidates[:1]}), "scatter") == []


def test_the_bars_of_the_layers_are_their_times(profiled: EfficiencyReport) -> None:
    (bars,) = drawings_of(profiled, "bars")
    assert [bar["value"] for bar in bars["bars"]] == pytest.approx([layer.time_ms or 0 for layer in profiled.layers])


def test_the_page_of_a_pruning_shows_its_rounds_its_training_and_its_sensitivity(pruned: EfficiencyReport) -> None:
    text = page_text(pruned)
    for needed in ("Rounds", "Training", "0.2121", "0.9529", "0.9832", "✓", "resumed once", "Sensitivity"):
        assert needed in text
    assert "891 kB → 127 kB, 891 kB dense" in text
    assert "faster" not in text


def test_a_report_without_rounds_has_none_of_these_sections(quantized: EfficiencyReport) -> None:
    assert blocks_of(quantized, "Rounds") == blocks_of(quantized, "Sensitivity") == []


def test_the_page_of_a_distillation_has_teacher_and_student_the_control_and_two_lines(
    distilled: EfficiencyReport,
) -> None:
    text = page_text(distilled)
    for needed in ("Teacher and student", "teacher: torch_eager float32", "student: torch_eager float32",
                   "effect of distillation", "without the teacher 0.9540 (+0.0040 to +0.0213)", "+0.0127",
                   "3,000 samples", "the two qualities can be compared, the losses cannot"):  # fmt: skip
        assert needed in text
    (curves,) = drawings_of(distilled, "curves")
    assert [[curve["name"] for curve in panel["curves"]] for panel in curves["panels"]] == [
        ["with the teacher", "without the teacher"]
    ] * 2


def test_students_after_a_trial_are_drawn_beside_their_teacher_and_held_to_no_guard(
    distilled: EfficiencyReport,
) -> None:
    (scatter,) = drawings_of(distilled, "scatter")
    assert "guard" not in scatter
    assert {point["kind"] for point in scatter["points"]} == {"original", "kept", "point"}
    assert scatter["points"][0]["text"] == "teacher, speedup 1"
    assert "quality on the selection split, after a short trial" in page_text(distilled)


def test_a_distillation_without_a_control_has_one_line_and_no_tile_for_it(distilled: EfficiencyReport) -> None:
    alone = distilled.model_copy(update={"control": None})
    assert "effect of distillation" not in page_text(alone)
    (curves,) = drawings_of(alone, "curves")
    assert [len(panel["curves"]) for panel in curves["panels"]] == [1, 1]
