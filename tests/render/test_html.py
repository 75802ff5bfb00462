"""Tests of the page for a person."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from omgoptim.render.html import report_html
from omgoptim.reports import EfficiencyReport

VOID = {"meta", "br", "line", "circle", "rect", "polyline"}


class Outline(HTMLParser):
    """Tags in order, whether they nest, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize(
    "name", ["quantized", "explained", "profiled", "planned", "pruned", "factorized", "distilled", "hostile"]
)
def test_the_page_is_well_formed_and_loads_nothing(name: str, request: pytest.FixtureRequest) -> None:
    page = report_html(request.getfixturevalue(name))
    outline = Outline(page)
    assert outline.open == []
    assert outline.links == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(outline.tags)
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_says_what_the_report_says(quantized: EfficiencyReport) -> None:
    text = " ".join(Outline(report_html(quantized)).words)
    for needed in ("OK", "5.79x", "3.76x", "faster (5.41 to 6.18)", "0.9833", "guard", *quantized.warnings):
        assert needed in text
    assert quantized.repeat in text
    assert quantized.next_steps[0].command in text


def test_no_text_of_a_model_becomes_markup(hostile: EfficiencyReport) -> None:
    page = report_html(hostile)
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_chosen_candidate_is_marked_and_one_below_the_guard_is_red(quantized: EfficiencyReport) -> None:
    page = report_html(quantized)
    assert page.count('class="pick"') == 1
    assert page.count('class="out"') == 1
    assert page.count('class="dot"') == 3
    assert page.count('class="guard"') == 1


def test_a_better_quality_lies_higher_and_a_faster_candidate_further_right(quantized: EfficiencyReport) -> None:
    page = report_html(quantized)
    chosen, dropped = (
        re.search(rf'class="{kind}" cx="([\d.]+)" cy="([\d.]+)"', page) for kind in ("pick", "out")
    )  # fmt: skip
    assert chosen
    assert dropped
    assert float(chosen[1]) > float(dropped[1])
    assert float(chosen[2]) < float(dropped[2])


def test_one_candidate_with_numbers_is_no_picture(quantized: EfficiencyReport) -> None:
    page = report_html(quantized.model_copy(update={"candidates": quantized.candidates[:1]}))
    assert "<svg" not in page


def test_the_bars_of_the_layers_are_in_proportion_to_their_time(profiled: EfficiencyReport) -> None:
    widths = [float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', report_html(profiled))]
    times = [layer.time_ms or 0 for layer in profiled.layers]
    assert [round(width / widths[0], 2) for width in widths] == [round(time / times[0], 2) for time in times]


def test_the_page_of_a_pruning_shows_its_rounds_its_training_and_its_sensitivity(pruned: EfficiencyReport) -> None:
    text = " ".join(Outline(report_html(pruned)).words)
    for needed in ("Rounds", "Training", "0.2121", "0.9529", "0.9832", "✓", "resumed once", "Sensitivity"):
        assert needed in text
    assert "891 kB → 127 kB, 891 kB dense" in text
    assert "faster" not in text


def test_every_picture_says_in_words_what_it_is(pruned: EfficiencyReport) -> None:
    page = report_html(pruned)
    assert page.count("<svg") == 2
    assert page.count('role="img"') == 2
    assert 'aria-label="Loss and quality over the epochs"' in page
    assert "<title>3.shortcut. 50%: drop 0.0000, 75%: drop 0.0067, 90%: drop 0.0438</title>" in page


def test_a_report_without_rounds_has_none_of_these_sections(quantized: EfficiencyReport) -> None:
    page = report_html(quantized)
    assert "Rounds" not in page
    assert "Sensitivity" not in page


def test_the_page_of_a_distillation_has_teacher_and_student_the_control_and_two_lines(
    distilled: EfficiencyReport,
) -> None:
    page = report_html(distilled)
    text = " ".join(Outline(page).words)
    for needed in ("Teacher and student", "teacher: torch_eager float32", "student: torch_eager float32"):
        assert needed in text
    for needed in (
        "effect of distillation",
        "without the teacher 0.9540 (+0.0040 to +0.0213)",
        "+0.0127",
        "3,000 samples",
    ):
        assert needed in text
    assert page.count('class="curve quality"') == page.count('class="curve quality control"') == 1
    assert "the two losses measure different things; the qualities compare" in text


def test_students_after_a_trial_are_drawn_beside_their_teacher_and_held_to_no_guard(
    distilled: EfficiencyReport,
) -> None:
    page = report_html(distilled)
    assert 'class="guard"' not in page
    assert 'class="out"' not in page
    assert "teacher, speedup 1" in page
    assert "quality on the selection split, after a short trial" in page


def test_a_distillation_without_a_control_has_one_line_and_no_tile_for_it(distilled: EfficiencyReport) -> None:
    page = report_html(distilled.model_copy(update={"control": None}))
    assert "effect of distillation" not in page
    assert 'class="curve quality"' in page
    assert 'class="curve quality control"' not in page
    assert "the two losses" not in page
