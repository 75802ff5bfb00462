"""Tests of what is shown to others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from omgoptim.errors import ModelError
from omgoptim.render.shared import MAX_CHARACTERS, error_to_share, shared_markdown, without_paths
from omgoptim.reports import EfficiencyReport


def test_the_verdict_and_the_table_are_seen_and_the_rest_is_collapsed(quantized: EfficiencyReport) -> None:
    seen, _, folded = shared_markdown(quantized).partition("<details>")
    for needed in (
        "**OK** Static int8",
        "| latency p50 | 0.412 ms | 0.0712 ms | 5.79x faster (5.41 to 6.18) |",
        "5 fresh",
    ):
        assert needed in seen
    assert quantized.warnings[0] in seen
    for needed in (
        "Candidates:",
        "| `classifier` |",
        quantized.repeat,
        quantized.next_steps[0].command,
        "AMD EPYC 9R14",
    ):
        assert needed in folded
    assert folded.count("<details>") + 1 == folded.count("</details>")


@pytest.mark.parametrize("name", ["quantized", "explained", "profiled", "planned", "pruned", "factorized", "distilled"])
def test_every_table_is_a_table_and_every_collapsed_part_is_markdown(name: str, request: pytest.FixtureRequest) -> None:
    text = shared_markdown(request.getfixturevalue(name))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    tables = sum(token.type == "table_open" for token in tokens)
    assert tables == len(re.findall(r"^\|(?: --- \|)+$", text, re.MULTILINE))
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    assert not any("---" in child.content for children in cells for child in children)
    assert all(re.fullmatch(r"</?details>.*\n?", token.content) for token in tokens if token.type == "html_block")


def test_it_fits_a_comment_however_large_the_report_is(hostile: EfficiencyReport) -> None:
    text = shared_markdown(hostile)
    assert len(text) <= MAX_CHARACTERS
    assert text.count("<details>") == text.count("</details>")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/me/project/net.py:build", "net.py:build"),
        ("/home/me/project", "."),
        ("/home/me/projects/x.npz", "…/x.npz"),
        ("--data=/data/sets/digits.npz", "--data=…/digits.npz"),
        ("'/home/me/a b/model.onnx'", "'…/a b/model.onnx'"),
        ("file:///srv/data/x.npz", "…/x.npz"),
        ("~/data/x.npz", "…/x.npz"),
        (r"C:\Users\me\data\x.npz", "…/x.npz"),
        (r"\\server\share\x.npz", "…/x.npz"),
        ("8,031 /s and 1/2 or a/b/c", "8,031 /s and 1/2 or a/b/c"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("drop -0.1 / 3", "drop -0.1 / 3"),
    ],
)
def test_no_path_of_the_machine_is_left(path: str, shown: str, quantized: EfficiencyReport) -> None:
    report = quantized.model_copy(update={"warnings": [f"see {path}"], "repeat": f"omgoptim profile {path}"})
    assert without_paths(report).warnings == [f"see {shown}"]
    assert without_paths(report).repeat == f"omgoptim profile {shown}"


def test_a_whole_report_names_neither_the_project_nor_the_home(quantized: EfficiencyReport) -> None:
    assert "/home/me" in quantized.model_dump_json()
    assert "/home" not in shared_markdown(quantized)
    assert "/home" not in without_paths(quantized).model_dump_json()
    assert "…/python (the project's .venv)" in shared_markdown(_elsewhere(quantized))


def _elsewhere(report: EfficiencyReport) -> EfficiencyReport:
    environment = report.environment.model_copy(update={"python": "/opt/venv/bin/python (the project's .venv)"})
    return report.model_copy(update={"environment": environment})


def test_an_error_is_shared_without_its_log_and_its_paths() -> None:
    text = error_to_share(ModelError(f"cannot read {Path('/home/me/net.py')}", "because", "fix it", "secret log line"))
    assert text == "**FAILED** omgoptim\n\nError: cannot read …/net.py\nWhy: because\nFix: fix it"
