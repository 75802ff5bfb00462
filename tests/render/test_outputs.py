from __future__ import annotations

import io

import pytest
from pages import page_text
from rich.console import Console

from omgoptim.render.brief import brief_report
from omgoptim.render.markdown import report_markdown
from omgoptim.render.sections.results import agreement_text
from omgoptim.render.terminal import report_view
from omgoptim.reports import EfficiencyReport, OutputRecord

SCORES = OutputRecord(
    name="scores",
    shape=["batch", 2],
    dtype="float32",
    kind="class_scores",
    evidence="each row is not negative and sums to one",
    compared_by="top1_agreement",
    labelled=True,
    agreement=0.985,
)
BOXES = OutputRecord(
    name="boxes`</td><script>",
    shape=["batch", 4],
    dtype="float32",
    kind="values",
    evidence="floating",
    compared_by="r2_agreement",
    agreement=0.31,
    relative_error=0.83,
    ruined=True,
)


def terminal(report: EfficiencyReport, full: bool = False) -> str:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as captured:
        console.print(report_view(report, full=full))
    return captured.get()


def test_several_outputs_are_in_every_form_of_the_report(quantized: EfficiencyReport) -> None:
    report = quantized.model_copy(update={"outputs": [BOXES, SCORES]})
    for text in (terminal(report), report_markdown(report), page_text(report)):
        assert "(batch, 4)" in text
        assert "R2 0.3100 (relative error 0.8300, ruined)" in text
        assert "same class 98.5%" in text
        assert "class scores, labelled" in text
    assert [output["name"] for output in brief_report(report)["outputs"]][1] == "scores"


def test_a_single_output_is_told_in_full_detail_only_unless_it_was_ruined(quantized: EfficiencyReport) -> None:
    report = quantized.model_copy(update={"outputs": [SCORES]})
    assert "same class" not in report_markdown(report)
    assert "same class" not in terminal(report)
    assert "same class 98.5%" in report_markdown(report, "full")
    assert "same class 98.5%" in terminal(report, full=True)
    ruined = quantized.model_copy(update={"outputs": [BOXES]})
    assert "ruined" in report_markdown(ruined)


def test_what_a_fresh_process_gave_is_told_in_full_detail(quantized: EfficiencyReport) -> None:
    outputs = [SCORES.model_copy(update={"reopened": 2.125e-7}), BOXES.model_copy(update={"reopened": 0.0})]
    report = quantized.model_copy(update={"outputs": outputs})
    for form in (report_markdown(report, "full"), terminal(report, full=True), page_text(report)):
        assert "within 2.1e-07" in " ".join(form.split())
        assert "bit for bit" in " ".join(form.split())
    assert "within 2.1e-07" not in report_markdown(report)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"weight": 0.0}, "not compared"), ({"agreement": None}, ""), ({"kind": "integers"}, "equal 98.5%")],
)
def test_what_was_not_measured_is_not_told(changes: dict[str, object], words: str) -> None:
    assert agreement_text(SCORES.model_copy(update=changes)) == words
