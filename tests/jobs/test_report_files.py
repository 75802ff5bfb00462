"""Tests of what lies beside a report."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import by_hand
import numpy as np
import pytest

from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.report_files import write_report_files
from omgoptim.models import artifact
from omgoptim.models.manifest import Manifest, verify_files
from omgoptim.models.output_check import OutputCheck
from omgoptim.reports import Alternative, Artifact, EfficiencyReport
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature


def report_of(folder: RunFolder, **changes: object) -> EfficiencyReport:
    own = Artifact(path=str(folder.artifact), files={}, load="")
    return by_hand.report(run_id=folder.id, artifact=own, **changes)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return by_hand.running_run(tmp_path)


def test_page_badge_and_card_are_written_and_the_same_report_gives_the_same(run: RunFolder) -> None:
    run.artifact.mkdir()
    write_report_files(run, report_of(run))
    files = [run.html_file, run.badge_file, run.artifact / "card.md"]
    first = [file.read_bytes() for file in files]
    write_report_files(run, report_of(run))
    assert [file.read_bytes() for file in files] == first
    assert ElementTree.fromstring(first[1]).tag.endswith("svg")
    assert first[2].startswith(b"---\nlicense:  # yours to fill in\n")


def test_a_copy_and_each_finalist_have_a_card_of_their_own(run: RunFolder, tmp_path: Path) -> None:
    copy, kept = tmp_path / "out", run.alternatives / "exact"
    for folder in (run.artifact, copy, kept):
        folder.mkdir(parents=True)
    other = Alternative(name="exact", candidate="x", runtime="x", precision="int8", holds=True, path="p", command="c")
    run.write_report_to(run.alternatives / "exact.json", report_of(run, summary="the exact one"))
    own = Artifact(path=str(copy), files={}, load="")
    write_report_files(run, report_of(run, alternatives=[other]).model_copy(update={"artifact": own}))
    assert "the exact one" in (kept / "card.md").read_text()
    assert "the exact one" not in (run.artifact / "card.md").read_text()
    assert (copy / "card.md").read_text() == (run.artifact / "card.md").read_text()


def test_a_card_leaves_the_hmac_the_size_and_the_files_of_an_artifact_as_they_were(
    run: RunFolder, tmp_path: Path
) -> None:
    program = tmp_path / "model.onnx"
    program.write_bytes(b"")  # no engine opens it here
    signature = Signature((InputTensor("x", "float32", (BATCH, 3), keyword=False),), outputs="tensor")
    check = OutputCheck({"x": np.zeros((2, 3), np.float32)}, [np.zeros((2, 2), np.float32)])
    artifact.save_program(run.artifact, program, Manifest("onnxruntime", "float32", signature), check)
    before = Manifest.read(run.artifact)
    write_report_files(run, report_of(run))
    assert (run.artifact / "card.md").is_file()
    after = Manifest.read(run.artifact)
    assert after == before
    assert after.made_here
    assert after.size_bytes == before.size_bytes
    assert "card.md" not in after.files
    verify_files(run.artifact, after)
    artifact.copy_artifact(run.artifact, tmp_path / "copy")
    assert Manifest.read(tmp_path / "copy").made_here


@pytest.mark.parametrize(
    ("model", "there", "base"),
    [
        ("hf:org/digits", False, 'base_model: "org/digits"'),
        ("hf:org/digits", True, ""),  # a folder of the project
        ("hf:/home/me/digits", False, ""),
        ("timm:resnet18", False, ""),
        ("net.py:build", False, ""),
    ],
)
def test_a_base_model_is_one_that_the_hub_has(
    model: str, there: bool, base: str, run: RunFolder, tmp_path: Path
) -> None:
    run.artifact.mkdir()
    (tmp_path / "org" / "digits").mkdir(parents=True) if there else None
    write_report_files(run, report_of(run, request={"model": model}))
    card = (run.artifact / "card.md").read_text()
    assert (base in card) if base else ("base_model" not in card)


def test_a_link_in_the_place_of_an_artifact_is_not_written_through(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    run.artifact.symlink_to(tmp_path / "elsewhere")
    write_report_files(run, report_of(run))
    assert list((tmp_path / "elsewhere").iterdir()) == []
