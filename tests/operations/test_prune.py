"""prune as a whole run: real models, fine-tuned, saved, reopened in fresh processes and measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import omgoptim
from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.errors import DataError, RequestError, TechniqueError
from omgoptim.jobs.actions import resume
from omgoptim.jobs.folder import find_run
from omgoptim.jobs.states import load_report
from omgoptim.models.artifact import load_module
from omgoptim.models.manifest import Manifest
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.reports import EfficiencyReport

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COMMON = {"timing": "quick", "checkpoint": "net.pt", "data": "net.py:load"}

ACCURACY = """
import numpy, omgoptim
from sklearn.datasets import load_digits
digits = load_digits()
model = omgoptim.open_artifact(sys.argv[2])
scores = model((digits.images[1250:, None] / 16).astype("float32"))
print((scores.argmax(1) == digits.target[1250:]).mean())
"""


BLIND = """

def blind(split):
    images, target = load(split).tensors
    return TensorDataset(images, (target + 1) % 10 if split == "calibration" else target)
"""


def accuracy_elsewhere(artifact: str) -> float:
    command = [sys.executable, "-c", IMPORT_OMGOPTIM + ACCURACY, str(PACKAGE_FILE), artifact]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def halved(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, EfficiencyReport]]:
    """A project, and the report of a run in it that removed half of the channels and trained for two epochs."""
    folder = tmp_path_factory.mktemp("halved")
    for name in ("net.py", "net.pt"):
        (folder / name).write_bytes((trained / name).read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMGOPTIM_PROJECT", str(folder))
        patch.chdir(folder)
        yield folder, omgoptim.prune("net.py:net", pruning_ratio=0.5, epochs=2, max_quality_drop=0.1, **COMMON)


def test_structured_pruning_removes_channels_and_the_reopened_artifact_gives_the_reported_quality(
    halved: tuple[Path, EfficiencyReport],
) -> None:
    project, report = halved
    assert report.outcome == "ok", report.summary
    assert report.before is not None
    assert report.after is not None
    assert report.artifact is not None
    assert report.after.params is not None
    assert report.before.params is not None
    assert report.after.params < 0.6 * report.before.params
    assert (report.after.macs or 0) < 0.6 * (report.before.macs or 0)
    assert {change.path for change in report.changed} >= {"0", "3"}
    assert accuracy_elsewhere(report.artifact.path) == pytest.approx(report.after.quality, abs=1e-9)
    folder = Path(report.artifact.path)
    assert {"recipe.json", "weights.safetensors", "model.onnx", "model.pt2"} <= set(report.artifact.files)
    module = load_module(folder, Manifest.read(folder), PathPolicy(folder.parents[3]))
    assert module.get_submodule("8").out_features == 10
    assert module.get_submodule("0").out_channels == 8
    assert report.training is not None
    assert [epoch.epoch for epoch in report.training.epochs] == [1, 2]
    assert not (project / ".omgoptim/runs" / report.run_id / "checkpoints").exists()


def test_a_schedule_ends_at_exactly_the_sparsity_and_zeros_stay_zero_while_training(project: Path) -> None:
    report = omgoptim.prune(
        "net.py:net", method="magnitude", sparsity=0.9, schedule="0.5,0.75,0.9", epochs=1, sensitivity=True,
        max_quality_drop=1, **COMMON,
    )  # fmt: skip
    assert report.artifact is not None
    assert [round_.amount for round_ in report.rounds] == [0.5, 0.75, 0.9]
    state = _state(Path(report.artifact.path))
    weights = torch.cat([state[f"{path}.weight"].flatten() for path in ("0", "3", "8")])
    assert int((weights == 0).sum()) == round(0.9 * weights.numel())
    assert not torch.signbit(weights[weights == 0]).any()
    assert report.after is not None
    assert report.after.dense_size_bytes is not None
    assert report.after.size_bytes is not None
    assert report.after.size_bytes < report.after.dense_size_bytes
    assert {point.amount for point in report.sensitivity} == {0.25, 0.5, 0.75}
    assert {point.path for point in report.sensitivity} == {"0", "3", "8"}
    assert "x faster" not in report.summary  # a single launch proves nothing


def test_a_round_that_loses_too_much_is_undone_and_the_best_within_the_guard_is_the_artifact(project: Path) -> None:
    report = omgoptim.prune(
        "net.py:net", method="magnitude", sparsity=0.99, schedule="0.2,0.99", epochs=0, max_quality_drop=0.02, **COMMON
    )
    assert report.outcome == "guard_failed"
    assert [round_.kept for round_ in report.rounds] == [True, False]
    kept, undone = report.rounds
    assert undone.quality_taken is not None
    assert undone.quality_reestimated is not None
    assert undone.quality_trained is None
    assert undone.quality_reestimated > undone.quality_taken
    assert kept.quality_drop is not None
    assert kept.quality_drop <= 0.02
    assert report.artifact is not None
    state = _state(Path(report.artifact.path))
    weights = torch.cat([state[f"{path}.weight"].flatten() for path in ("0", "3", "8")])
    assert int((weights == 0).sum()) == round(0.2 * weights.numel())
    assert "round 1 is kept" in report.summary
    assert report.gains is not None
    assert report.gains.quality_drop is not None
    assert report.gains.quality_drop <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("held", [True, False])
def test_a_round_that_fails_only_on_the_evaluation_data_gives_way_to_an_earlier_one(project: Path, held: bool) -> None:
    with (project / "net.py").open("a") as file:  # wrong labels: no round loses anything on the selection samples
        file.write(BLIND)
    schedule, guard = ("0.2,0.3,0.99", 0.03) if held else ("0.98,0.99", 0.001)
    blind = COMMON | {"data": "net.py:blind", "max_quality_drop": guard}
    report = omgoptim.prune("net.py:net", method="magnitude", sparsity=0.99, schedule=schedule, epochs=0, **blind)
    assert report.outcome == "guard_failed"
    assert report.gains is not None
    assert report.gains.quality_drop is not None
    assert (report.gains.quality_drop <= guard) == held
    assert [round_.kept for round_ in report.rounds] == ([False, True, False] if held else [False, True])
    words = "round 2, the next in an order fixed before the evaluation data was read, is kept"
    assert (words in report.summary) == held
    assert any("failed the guard on the evaluation data too" in warning for warning in report.warnings) != held
    assert report.artifact is not None
    state = _state(Path(report.artifact.path))
    weights = torch.cat([state[f"{path}.weight"].flatten() for path in ("0", "3", "8")])
    assert int((weights == 0).sum()) == round((0.3 if held else 0.99) * weights.numel())


@pytest.mark.slow
def test_a_pruned_artifact_is_pruned_again_and_quantized_with_its_lineage_and_then_it_is_a_program(
    halved: tuple[Path, EfficiencyReport],
) -> None:
    _, first = halved
    chained = {"timing": "quick", "data": "net.py:load", "max_quality_drop": 1}
    second = omgoptim.prune(first.run_id, method="magnitude", sparsity=0.5, epochs=0, **chained)
    third = omgoptim.quantize(second.run_id, scheme="static", runtime="onnxruntime", **chained)
    assert third.lineage == [first.run_id, second.run_id, third.run_id]
    assert third.artifact is not None
    assert third.after is not None
    assert accuracy_elsewhere(third.artifact.path) == pytest.approx(third.after.quality, abs=1e-9)
    assert third.before is not None
    assert third.before.params == second.after.params == first.after.params  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="cannot follow quantization"):
        omgoptim.prune(third.run_id, data="net.py:load", timing="quick")


@pytest.mark.slow
def test_a_live_module_is_pruned_on_a_copy(project: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))) for _ in range(8)]
    data = {"train": batches[:4], "calibration": batches[4:6], "eval": batches[6:]}
    report = omgoptim.prune(net, data=data, pruning_ratio=0.5, timing="quick", max_quality_drop=1)
    assert report.artifact is not None
    assert omgoptim.open_artifact(report.artifact.path)(batches[0][0]).shape == (16, 10)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert report.repeat.startswith("omgoptim.prune(model, ")


def test_another_engine_runs_the_artifact_and_both_are_measured_on_it(project: Path) -> None:
    report = omgoptim.prune(
        "net.py:net", pruning_ratio=0.5, epochs=0, runtime="onnxruntime", max_quality_drop=1, **COMMON
    )
    assert report.before is not None
    assert report.after is not None
    assert report.before.runtime == report.after.runtime == "onnxruntime"
    assert report.artifact is not None
    manifest = Manifest.read(Path(report.artifact.path))
    assert manifest.size_bytes == manifest.files["model.onnx"]["bytes"]
    assert accuracy_elsewhere(report.artifact.path) == pytest.approx(report.after.quality, abs=1e-9)


@pytest.mark.slow
def test_no_data_and_no_training_prune_by_pattern(project: Path) -> None:
    report = omgoptim.prune(
        "net.py:net", checkpoint="net.pt", inputs=["1x1x8x8"], method="semi_structured", pattern="2:4", timing="quick",
        max_quality_drop=1,
    )  # fmt: skip
    assert report.artifact is not None
    weight = _state(Path(report.artifact.path))["8.weight"]
    assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    assert report.training is None


def test_without_data_a_load_beside_the_model_is_taken_and_that_is_said(project: Path) -> None:
    report = omgoptim.prune("net.py:net", checkpoint="net.pt", method="semi_structured", plan=True)
    assert "no data was given: using net.py:load, found beside the model" in report.warnings


@pytest.mark.slow
def test_lora_recovers_and_leaves_plain_layers(project: Path) -> None:
    report = omgoptim.prune(
        "net.py:net", pruning_ratio=0.5, epochs=1, recover="lora", lora_rank=4, max_quality_drop=1, **COMMON
    )
    assert report.training is not None
    assert report.training.trained_params < report.training.total_params / 2
    assert any("not time at inference" in warning for warning in report.warnings)
    assert report.artifact is not None
    assert "8.weight" in _state(Path(report.artifact.path))


def test_a_plan_changes_nothing_and_says_what_would_be(project: Path) -> None:
    before = sorted(path.name for path in project.iterdir())
    report = omgoptim.prune("net.py:net", pruning_ratio=0.5, plan=True, **COMMON)
    assert report.artifact is None
    assert report.summary.startswith("Dry run")
    assert {change.path for change in report.changed} >= {"0", "3"}
    assert report.next_steps[0].tool == "prune"
    assert sorted(path.name for path in project.iterdir()) == sorted({*before, ".omgoptim"})


@pytest.mark.slow
def test_a_loss_that_becomes_nan_stops_the_training_and_keeps_the_best_weights(project: Path) -> None:
    (project / "bad.py").write_text("def loss(outputs, target):\n    return outputs.sum() * float('nan')\n")
    report = omgoptim.prune(
        "net.py:net", pruning_ratio=0.25, epochs=2, loss="bad.py:loss", distill=False, max_quality_drop=1, **COMMON
    )
    assert report.training is not None
    assert report.training.stopped is not None
    assert "nan" in report.training.stopped
    assert report.artifact is not None
    assert all(torch.isfinite(value).all() for value in _state(Path(report.artifact.path)).values())


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"method": "wanda", "data": None, "inputs": ["1x1x8x8"]}, DataError, "needs data"),
        ({"importance": "taylor", "data": None, "inputs": ["1x1x8x8"]}, DataError, "needs data"),
        ({"epochs": 3, "data": None, "inputs": ["1x1x8x8"]}, DataError, "there is no training data"),
        ({"method": "magnitude", "targets": ["nothing.*"]}, TechniqueError, "matches no layer"),
        ({"output": "net.py"}, RequestError, "exists already"),
    ],
)  # fmt: skip
def test_bad_requests_say_what_to_do_and_leave_nothing(
    project: Path, arguments: dict[str, object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as failure:
        omgoptim.prune("net.py:net", **{**COMMON, **arguments})  # type: ignore[arg-type]
    assert words in str(failure.value)
    (run,) = (project / ".omgoptim/runs").iterdir()
    assert not (run / "artifact").exists()


KILLED_LOAD = """
import os, signal
from net import load as whole
from pathlib import Path
from torch.utils.data import DataLoader

class Counted(DataLoader):
    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            seen = Path(__file__).with_name("passes")
            seen.write_text(seen.read_text() + "x" if seen.exists() else "x")
            if len(seen.read_text()) == KILL_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

def load(split):
    return Counted(whole(split), batch_size=100, shuffle=True) if split == "train" else whole(split)
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_round_resumes_to_the_same_weights(project: Path) -> None:
    arguments = ["net.py:net", "--checkpoint", "net.pt", "--method", "magnitude", "--sparsity", "0.8", "--rounds", "2"]
    arguments += ["--schedule", "linear", "--epochs", "2", "--timing", "quick", "--max-quality-drop", "1", "--json"]
    (project / "once.py").write_text(KILLED_LOAD.replace("KILL_AT", "10**9"))
    whole = _shell(project, [*arguments, "--data", "once.py:load"])
    total = len((project / "passes").read_text())
    (project / "killed.py").write_text(KILLED_LOAD.replace("KILL_AT", str(total - 4)))
    (project / "passes").unlink()
    command = [sys.executable, "-m", "omgoptim.cli", "prune", *arguments, "--data", "killed.py:load"]
    died = subprocess.run(command, capture_output=True, text=True, env=_environment(project), check=False)
    assert died.returncode == 3, died.stderr
    assert "runs resume" in died.stderr
    run = next(path for path in (project / ".omgoptim/runs").iterdir() if (path / "checkpoints").is_dir())
    assert (run / "checkpoints/round-1/done").is_dir()
    folder = find_run(project, run.name)
    resume(folder)
    list(_follow(folder))
    report = load_report(folder)
    assert report.training is not None
    assert report.training.resumed == 1
    assert len(report.training.epochs) == 4
    assert report.artifact is not None
    expected, actual = _state(Path(whole["artifact"]["path"])), _state(Path(report.artifact.path))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def _follow(folder: object) -> object:
    from omgoptim.jobs.follow import follow

    return follow(folder, 300.0, interval_s=0.1)  # type: ignore[arg-type]


def _environment(project: Path) -> dict[str, str]:
    ours = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMGOPTIM_PROJECT": str(project),
        "OMGOPTIM_PYTHON": sys.executable,
    }
    return dict(os.environ) | ours


def _shell(project: Path, arguments: list[str]) -> dict[str, dict[str, str]]:
    command = [sys.executable, "-m", "omgoptim.cli", "prune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(project), check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, dict[str, str]] = json.loads(done.stdout)
    return report


def _state(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "weights.safetensors").is_file() and not json.loads((folder / "recipe.json").read_text()).get(
        "packed"
    ):
        return dict(load_file(folder / "weights.safetensors"))
    return dict(load_module(folder, Manifest.read(folder), PathPolicy(folder.parents[3])).state_dict())
