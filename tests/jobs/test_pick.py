"""Picking another finalist: artifact and report are swapped completely, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import by_hand
import pytest

from omgoptim import cli
from omgoptim.errors import RunError
from omgoptim.jobs.actions import pick
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import load_report, read_state
from omgoptim.reports import Alternative


def alternative(name: str) -> Alternative:
    return Alternative(name=name, candidate=name, runtime="x", precision="int8", holds=True, path="p", command="c")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that delivered `small` and keeps `exact`."""
    first = by_hand.report(delivered="small", alternatives=[alternative("exact")])
    folder = by_hand.finished_run(tmp_path, first)
    other = first.model_copy(
        update={
            "run_id": folder.id,
            "outcome": "guard_failed",
            "summary": "the exact one",
            "delivered": "exact",
            "alternatives": [alternative("small")],
        }
    )
    for place, text in ((folder.artifact, "small"), (folder.alternatives / "exact", "exact")):
        place.mkdir(parents=True)
        (place / "model.onnx").write_text(text)
    folder.write_report_to(folder.alternatives / "exact.json", other)
    return folder


def test_the_picked_one_takes_the_place_of_the_artifact_and_back_again(run: RunFolder) -> None:
    before = load_report(run)
    assert pick(run, "exact").summary == "the exact one"
    assert (run.artifact / "model.onnx").read_text() == "exact"
    assert (run.alternatives / "small" / "model.onnx").read_text() == "small"
    assert not (run.alternatives / "exact").exists()
    assert load_report(run).delivered == "exact"
    assert (read_state(run).outcome, read_state(run).summary) == ("guard_failed", "the exact one")
    assert "the exact one" in run.html_file.read_text()
    assert pick(run, "small") == before
    assert (run.artifact / "model.onnx").read_text() == "small"
    assert pick(run, "small") == before  # it is delivered already


def test_what_is_not_kept_is_refused_with_what_is_and_nothing_moves(run: RunFolder) -> None:
    with pytest.raises(RunError, match="has no finalist 'exat'") as caught:
        pick(run, "exat")
    assert "exact" in caught.value.why
    (run.alternatives / "exact" / "model.onnx").unlink()
    (run.alternatives / "exact").rmdir()
    with pytest.raises(RunError, match="the artifact of 'exact' is gone"):
        pick(run, "exact")
    (run.alternatives / "exact.json").write_text("{")
    with pytest.raises(RunError, match="the report of 'exact' is missing or damaged"):
        pick(run, "exact")
    assert (run.artifact / "model.onnx").read_text() == "small"
    assert load_report(run).delivered == "small"


@pytest.mark.parametrize("words", [["pick"], ["runs", "pick"]])
def test_the_shell_picks_by_either_command_and_ends_with_the_code_of_what_was_picked(
    words: list[str], run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*words, run.id, "exact", "--project", str(tmp_path), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["delivered"] == "exact"
    assert cli.run(["runs", "pick", run.id, "--project", str(tmp_path)]) == 2  # without a name
