"""Tests of several runs in one table."""

from __future__ import annotations

import io

from rich.console import Console

from omgoptim.render import terminal
from omgoptim.render.blocks import Line, Table
from omgoptim.render.runs import TITLE, Run, runs_html, runs_json, runs_markdown, runs_section
from omgoptim.reports import EfficiencyReport, RunState


def run_of(report: EfficiencyReport | None, status: str = "done", **changes: object) -> Run:
    record = {
        "run_id": report.run_id if report else "run-1",
        "verb": "prune",
        "status": status,
        "model": "net.py:build",
    }
    return Run(RunState.model_validate(record | {"started": "t", "updated": "t", "folder": "/p"} | changes), report)


def rows_of(runs: list[Run]) -> list[dict[str, str]]:
    table = runs_section(runs).blocks[0]
    assert isinstance(table, Table)
    names = [column.name for column in table.columns]
    return [dict(zip(names, (cell.text for cell in row.cells), strict=True)) for row in table.rows]


def test_each_run_has_its_own_verdict_interval_and_quality(
    quantized: EfficiencyReport, factorized: EfficiencyReport, profiled: EfficiencyReport
) -> None:
    first, second, third = rows_of([run_of(quantized), run_of(factorized), run_of(profiled)])
    assert first["verdict"] == "OK"
    assert first["size"] == "331 kB, 3.76x smaller"
    assert first["latency"] == "0.0712 ms, 5.79x faster (5.41 to 6.18)"
    assert first["quality"] == "0.9833, drop 0.0028 (-0.0041 to 0.0083)"
    assert second["verdict"] == "GUARD FAILED"
    assert third["verdict"] == "MEASURED"
    assert third["latency"] == "0.412 ms"


def test_a_run_without_a_report_has_its_row_and_its_reason(quantized: EfficiencyReport) -> None:
    error = {"kind": "ModelError", "what": "nothing can be narrowed", "why": "", "fix": ""}
    runs = [
        run_of(quantized),
        run_of(None, "failed", error=error),
        run_of(None, "running", run_id="r2", stage="timing"),
    ]
    assert [row["verdict"] for row in rows_of(runs)] == ["OK", "FAILED", "RUNNING"]
    text = runs_markdown(runs)
    assert "- run-1: nothing can be narrowed" in text
    assert "- r2: timing" in text
    assert runs_json(runs)["runs"][1]["error"]["what"] == "nothing can be narrowed"


def test_one_model_and_one_machine_are_named_once(quantized: EfficiencyReport, planned: EfficiencyReport) -> None:
    runs = [run_of(quantized), run_of(planned)]
    assert "model" not in rows_of(runs)[0]
    lines = {one.label: one.text.text for one in runs_section(runs).blocks if isinstance(one, Line)}
    assert lines == {"model": "examples/digits_cnn.py:build", "machine": "AMD EPYC 9R14, 2 threads"}


def test_every_form_says_that_times_of_two_runs_are_not_compared(quantized: EfficiencyReport) -> None:
    runs = [run_of(quantized), run_of(quantized)]
    console = Console(file=io.StringIO(), width=400)
    console.print(terminal.section_view(runs_section(runs)))
    assert isinstance(console.file, io.StringIO)
    shown = [console.file.getvalue(), runs_markdown(runs), runs_html(runs), runs_json(runs)["note"]]
    assert all("Latencies of two runs cannot be divided by each other" in text for text in shown)


def test_the_page_and_the_markdown_name_no_path_of_the_machine(quantized: EfficiencyReport) -> None:
    runs = [run_of(quantized.model_copy(update={"warnings": ["see /home/me/project/log.txt"]}))] * 2
    error = {"kind": "ModelError", "what": "no /home/me/project/net.py", "why": "", "fix": ""}
    runs.append(run_of(None, "failed", error=error, model="/home/me/project/net.py:build"))
    assert "/home" not in runs_html(runs) + runs_markdown(runs)
    assert "see log.txt" in runs_html(runs)
    assert TITLE in runs_html(runs)
