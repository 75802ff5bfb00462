"""distill as a whole run: a student is trained, saved, reopened, and measured against its teacher."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import omgoptim
from omgoptim.errors import DataError, ModelError, OmgoptimError, RequestError, TechniqueError
from omgoptim.jobs.actions import resume
from omgoptim.jobs.folder import find_run
from omgoptim.jobs.follow import follow
from omgoptim.jobs.states import load_report
from omgoptim.models.artifact import load_module
from omgoptim.models.manifest import Manifest
from omgoptim.models.security.path_policy import PathPolicy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

STUDENTS = """
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from net import load, net

def small(width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))

def other_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

def other_inputs():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))

def unlabelled(split):
    images, target = load(split).tensors
    return TensorDataset(images, target) if split == "eval" else [images[i:i + 64] for i in range(0, len(images), 64)]

def mislabelled(split):
    images, target = load(split).tensors
    return TensorDataset(images, target + 10 * (split == "train"))

class Counted(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            with open("passes", "a") as file:
                file.write(".")
            if os.path.getsize("passes") == int(os.environ.get("KILL_AT", 0)):
                os.kill(os.getpid(), 9)
            yield batch

def killed(split):
    return Counted(load(split), batch_size=100, shuffle=True) if split == "train" else load(split)

def not_a_number(outputs, targets):
    return outputs.sum() * float("nan")
"""

TEACHER: dict[str, Any] = {"checkpoint": "net.pt", "timing": "quick", "max_quality_drop": 1}


@pytest.fixture
def digits_project(project: Path) -> Path:
    (project / "students.py").write_text(STUDENTS)
    return project


def distill(student: Any = "students.py:small", **arguments: Any) -> omgoptim.EfficiencyReport:
    return omgoptim.distill("net.py:net", student, **({"data": "net.py:load", "epochs": 2, **TEACHER} | arguments))


def reopened(report: omgoptim.EfficiencyReport) -> nn.Module:
    assert report.artifact is not None
    folder = Path(report.artifact.path)
    return load_module(folder, Manifest.read(folder), PathPolicy(folder.parents[3]))


def accuracy(module: Any, digits: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return float((module(digits[0]).argmax(1) == digits[1]).double().mean())


def test_a_given_student_is_trained_and_its_reopened_artifact_gives_the_reported_quality(
    digits_project: Path, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    before = hashlib.sha256((digits_project / "net.pt").read_bytes()).hexdigest()
    report = distill(epochs=12, learning_rate=0.01)
    assert report.outcome == "ok"
    assert report.before is not None
    assert report.after is not None
    assert report.training is not None
    assert (report.before.params, report.after.params) == (6186, 218)
    assert report.after.quality == pytest.approx(accuracy(reopened(report), digits), abs=1e-9)
    assert report.after.quality > 0.5
    assert report.before.quality is not None
    assert report.before.quality > report.after.quality
    assert [epoch.epoch for epoch in report.training.epochs] == list(range(1, 13))
    assert "cross-entropy" in report.training.loss
    assert "KL divergence" in report.training.loss
    assert "900 samples" in (report.training.teacher_outputs or "")
    assert [(change.path, change.what) for change in report.changed] == [("", "model")]
    assert report.next_steps[0].tool == "quantize"
    assert report.next_steps[0].arguments["model"] == report.run_id
    assert hashlib.sha256((digits_project / "net.pt").read_bytes()).hexdigest() == before


@pytest.mark.slow
def test_the_same_seed_gives_the_same_student_bit_for_bit(digits_project: Path) -> None:
    one, other = (reopened(distill(seed=3)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_control_tells_what_the_teacher_brought_and_the_better_one_is_kept(
    digits_project: Path, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    report = distill(epochs=3, control=True, learning_rate=0.01)
    control = report.control
    assert control is not None
    assert report.after is not None
    assert control.training is not None
    assert control.training.loss == "cross-entropy"
    assert control.training.teacher_outputs is None
    assert len(control.training.epochs) == 3
    assert control.quality is not None
    assert control.gain is not None
    assert control.gain_low is not None
    assert control.gain_high is not None
    assert control.gain_low <= control.gain <= control.gain_high
    shown = control.quality if control.kept else control.quality + control.gain
    assert report.after.quality == pytest.approx(shown, abs=1e-9)
    assert report.after.quality == pytest.approx(accuracy(reopened(report), digits), abs=1e-9)
    best = [max(epoch.quality or 0 for epoch in run.epochs) for run in (report.training, control.training) if run]
    assert control.kept == (best[1] > best[0])


@pytest.mark.slow
def test_a_teacher_of_no_say_makes_the_student_its_own_control(digits_project: Path) -> None:
    report = distill(alpha=1.0, control=True)
    assert report.control is not None
    assert (report.control.gain, report.control.kept) == (0.0, False)
    assert "no significant effect of distillation" in report.summary


def test_without_targets_the_student_learns_from_the_teacher_alone(digits_project: Path) -> None:
    report = distill(data="students.py:unlabelled", epochs=6, learning_rate=0.01)
    assert report.training is not None
    assert "cross-entropy" not in report.training.loss
    assert any("no targets" in warning for warning in report.warnings)
    assert report.after is not None
    assert report.after.quality is not None
    assert report.after.quality > 0.4
    with pytest.raises(RequestError, match=r"the control .* cannot be trained"):
        distill(data="students.py:unlabelled", control=True)


@pytest.mark.slow
def test_what_is_inside_the_teacher_is_learnt_and_leaves_nothing_in_the_artifact(digits_project: Path) -> None:
    report = distill(features="attention", epochs=1)
    assert report.after is not None
    assert report.after.params == 218
    assert report.training is not None
    assert "feature distillation needs its activations too" in (report.training.teacher_outputs or "")


def test_a_live_teacher_and_student_are_copied_and_the_student_travels_as_a_program(
    digits_project: Path, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    scope: dict[str, Any] = {}
    exec((digits_project / "net.py").read_text(), scope)
    teacher, student = scope["net"](), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    states = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in (teacher, student)]
    report = omgoptim.distill(teacher, student, data=scope["load"], epochs=1, timing="quick", max_quality_drop=1)
    for each, state in zip((teacher, student), states, strict=True):
        assert all(torch.equal(each.state_dict()[name], tensor) for name, tensor in state.items())
    assert report.artifact is not None
    assert report.after is not None
    assert report.after.quality == pytest.approx(accuracy(omgoptim.open_artifact(report.artifact.path), digits))
    assert report.repeat.startswith("omgoptim.distill(model")
    assert "student=student" in report.repeat


@pytest.mark.slow
def test_a_distilled_student_is_distilled_further_and_quantized_with_its_lineage(digits_project: Path) -> None:
    first = distill()
    second = distill(first.run_id, epochs=1)
    third = omgoptim.quantize(second.run_id, data="net.py:load", scheme="bf16", runtime="torch_eager", **quick())
    assert second.lineage == [first.run_id, second.run_id]
    assert third.lineage == [first.run_id, second.run_id, third.run_id]


def quick() -> dict[str, Any]:
    return {"timing": "quick", "max_quality_drop": 1}


def test_a_loss_that_is_no_number_ends_the_training_with_the_weights_from_before(digits_project: Path) -> None:
    report = distill(loss="students.py:not_a_number")
    assert report.training is not None
    assert "loss was nan" in (report.training.stopped or "")
    assert any("training ended early" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"student": "students.py:other_classes"}, DataError, "(2, 7)"),
        ({"student": "students.py:other_inputs"}, ModelError, "does not run on the teacher's inputs"),
        ({"student": "depthwize"}, ModelError, "Did you mean 'depthwise'"),
        ({"student": "students.py:nothing"}, ModelError, "the student"),
        ({"data": "students.py:mislabelled"}, DataError, "label 10 is out of range"),
        ({"output_loss": "dkd", "data": "students.py:unlabelled"}, DataError, "hinton"),
        ({"features": "minilm"}, OmgoptimError, "no query, key and value layers"),
    ],
)
def test_bad_input_is_refused_before_training_and_leaves_no_artifact(
    digits_project: Path, arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as refused:
        distill(**arguments)
    error = refused.value
    assert words in " ".join(str(getattr(error, part, "")) for part in ("what", "why", "fix"))
    (run,) = (digits_project / ".omgoptim/runs").iterdir()
    assert not (run / "artifact").exists()


def test_no_data_is_an_error_that_says_how_to_give_some(digits_project: Path) -> None:
    with pytest.raises(DataError) as refused:
        distill(data=None, inputs=["1x1x8x8"])
    assert "load('train')" in refused.value.fix


@pytest.mark.slow
def test_a_student_that_is_not_smaller_is_warned_of(digits_project: Path) -> None:
    report = distill("students.py:large", epochs=1)
    assert any("no smaller than the teacher" in warning for warning in report.warnings)


def test_a_plan_names_the_student_and_does_nothing(digits_project: Path) -> None:
    report = distill(plan=True, control=True)
    assert report.artifact is None
    assert "218 parameters" in report.summary
    assert "2 epochs of 15 batches, twice" in report.summary
    assert report.next_steps[0].arguments["student"] == "students.py:small"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_student(digits_project: Path) -> None:
    arguments = [
        "net.py:net",
        "--checkpoint",
        "net.pt",
        "--student",
        "students.py:small",
        "--data",
        "students.py:killed",
    ]
    arguments += ["--epochs", "4", "--features", "fitnets", "--timing", "quick", "--max-quality-drop", "1", "--json"]
    whole = shell(arguments, KILL_AT="1000000")
    assert whole.returncode == 0, whole.stderr
    total = (digits_project / "passes").stat().st_size
    (digits_project / "passes").unlink()
    died = shell(arguments, KILL_AT=str(total - 4))
    assert died.returncode == 3, died.stderr
    run = next(path for path in (digits_project / ".omgoptim/runs").iterdir() if (path / "checkpoints").is_dir())
    folder = find_run(digits_project, run.name)
    resume(folder)
    list(follow(folder, 300.0, interval_s=0.1))
    report = load_report(folder)
    assert report.training is not None
    assert report.training.resumed == 1
    path = Path(json.loads(whole.stdout)["artifact"]["path"])
    expected = load_module(path, Manifest.read(path), PathPolicy(digits_project)).state_dict()
    actual = reopened(report).state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def shell(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMGOPTIM_PROJECT": os.getcwd(),
        "OMGOPTIM_PYTHON": sys.executable,
    }
    command = [sys.executable, "-m", "omgoptim.cli", "distill", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ) | ours | environment, check=False
    )


# Students derived from the teacher


@pytest.mark.parametrize(
    ("student", "parameters"),
    [
        ("narrow", {"width": 0.5}),
        pytest.param("inverted_residual", {"width": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_a_derived_student_reopens_without_the_teachers_weights_and_gives_the_reported_quality(
    digits_project: Path, digits: tuple[torch.Tensor, torch.Tensor], student: str, parameters: dict[str, Any]
) -> None:
    report = distill(student, epochs=1, **parameters)
    assert report.before is not None
    assert report.after is not None
    assert (report.after.params or 0) < (report.before.params or 0)
    assert report.changed
    (digits_project / "net.pt").unlink()
    assert report.after.quality == pytest.approx(accuracy(reopened(report), digits), abs=1e-9)


@pytest.mark.slow
def test_auto_tries_several_ways_and_trains_the_best_within_the_target(digits_project: Path) -> None:
    report = distill("auto", target_compression=3, candidates=3, epochs=2)
    assert report.before is not None
    assert report.after is not None
    assert (report.after.params or 0) <= (report.before.params or 0) / 3
    chosen, *others = report.candidates
    assert chosen.status == "chosen"
    assert {other.status for other in others} <= {"dropped", "failed", "skipped"}
    assert "of trial" in chosen.why
    tried = [each for each in report.candidates if each.quality is not None]
    assert len(tried) == 3
    assert chosen.quality == max(each.quality or 0 for each in tried)
    assert all(each.speedup is not None for each in tried)
    repeated = distill(chosen.name.partition(",")[0].replace(" ", "_"), epochs=2, width=_width(report))
    assert repeated.after is not None
    assert repeated.after.params == report.after.params


def _width(report: omgoptim.EfficiencyReport) -> float:
    return float(report.candidates[0].name.partition("width ")[2])


def test_auto_that_reaches_no_target_says_what_was_tried(digits_project: Path) -> None:
    with pytest.raises(TechniqueError) as refused:
        distill("auto", target_compression=5000)
    assert "narrow" in refused.value.why
    assert "target_compression" in refused.value.fix


def test_a_plan_of_auto_lists_the_students_that_would_be_tried(digits_project: Path) -> None:
    report = distill("auto", target_compression=3, plan=True)
    assert report.artifact is None
    assert any(each.status == "planned" and "parameters" in each.why for each in report.candidates)


TRANSFORMER = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(self.embed(x))

def build():
    return Encoder().eval()

def load(split):
    generator = torch.Generator().manual_seed(len(split))
    return [torch.rand(16, 5, 8, generator=generator) for _ in range(4)]
"""


@pytest.mark.slow
def test_every_second_layer_of_a_transformer_is_kept_and_reopens(digits_project: Path) -> None:
    (digits_project / "encoder.py").write_text(TRANSFORMER)
    arguments: dict[str, Any] = {"data": "encoder.py:load", "epochs": 1, **quick()}
    report = omgoptim.distill("encoder.py:build", "auto", keep_layers=3, candidates=1, **arguments)
    module = reopened(report)
    assert len(module.get_submodule("layers.layers")) == 3
    assert report.after is not None
    assert report.after.metric == "r2_agreement"
    again = omgoptim.distill(report.run_id, "fewer_layers", keep_layers=2, **arguments)
    assert len(reopened(again).get_submodule("layers.layers")) == 2


def test_a_student_can_be_derived_without_a_run_and_the_teacher_stays_whole() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 5)
    ).eval()
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = omgoptim.derive_student(teacher, "narrow", inputs=torch.rand(4, 3, 8, 8), width=0.5)
    assert student.get_submodule("0").out_channels == 8
    assert student(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(RequestError, match="does not derive a student"):
        omgoptim.derive_student(teacher, "auto", inputs=torch.rand(4, 3, 8, 8))
