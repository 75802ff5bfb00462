"""quantize, whole: real models, real engines, fresh measuring processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import omgoptim
from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.errors import ArtifactError, DataError, RequestError, RunError, TechniqueError
from omgoptim.models import artifact as artifacts
from omgoptim.models.manifest import Manifest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COMMON = {"timing": "quick", "checkpoint": "net.pt", "data": "net.py:load"}

ACCURACY = """
import numpy, omgoptim
from sklearn.datasets import load_digits
digits = load_digits()
model = omgoptim.open_artifact(sys.argv[2])
scores = model((digits.images[1250:, None] / 16).astype("float32"))
print((scores.argmax(1) == digits.target[1250:]).mean(), "torch" in sys.modules)
"""


def test_the_artifact_gives_the_reported_quality_in_a_process_of_its_own_without_torch(project: Path) -> None:
    report = omgoptim.quantize("net.py:net", scheme="static", runtime="onnxruntime", **COMMON)
    assert report.artifact is not None
    assert report.after is not None
    command = [sys.executable, "-c", IMPORT_OMGOPTIM + ACCURACY, str(PACKAGE_FILE), report.artifact.path]
    accuracy, has_torch = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(accuracy) == pytest.approx(report.after.quality, abs=1e-9)
    assert has_torch == "False"
    assert report.gains is not None
    assert report.gains.size_ratio is not None
    assert report.gains.size_ratio > 2
    assert report.outcome == "ok"
    assert {change.path for change in report.changed} >= {"0", "3", "8"}
    assert report.coverage is not None
    assert (report.coverage.verdict, report.coverage.changed, report.coverage.total) == ("REAL", 3, 3)
    assert {layer.path: layer.computed_in for layer in report.coverage.layers}["3"] == "int8"
    saved = json.loads((project / ".omgoptim/runs" / report.run_id / "report.json").read_text())
    assert saved == report.model_dump(mode="json")


def test_a_live_module_and_its_data_work_and_the_module_stays_as_it_was(project: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))) for _ in range(8)]
    data = {"calibration": batches[:6], "eval": batches[6:]}
    report = omgoptim.quantize(
        net, data=data, scheme="dynamic", runtime="onnxruntime", timing="quick", max_quality_drop=1
    )
    assert report.artifact is not None
    opened = omgoptim.open_artifact(report.artifact.path)
    image = batches[0][0]
    assert torch.allclose(opened(image), net(image), atol=0.2)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not (project / ".omgoptim/runs" / report.run_id / "work").exists()


def test_float32_is_delivered_where_the_named_scheme_fails_the_guard_and_that_is_said_first(project: Path) -> None:
    mixed_precision = {"metric": "cosine", "max_quality_drop": 0, "guard_time_s": 1e-3}
    report = omgoptim.quantize("net.py:net", scheme="static", runtime="onnxruntime", **mixed_precision, **COMMON)
    assert report.outcome in ("ok", "no_gain")  # by the machine's load: it holds the guard, and is no smaller
    first, second, *_ = report.summary.split(". ")
    assert first.startswith("Nothing was quantized: static-")
    assert "more than 0" in first
    assert second == "Chosen instead: fp32 on onnxruntime, float32 on that engine, which passes the guard"
    assert report.delivered == "fp32-on-onnxruntime"
    assert report.gains is not None
    assert report.gains.quality_drop == pytest.approx(0, abs=1e-6)
    assert report.artifact is not None
    assert Manifest.read(Path(report.artifact.path)).precision == "float32"
    assert [step.tool for step in report.next_steps] == ["runs", "quantize", "quantize"]
    assert report.next_steps[-1].arguments["guard_time_s"] == pytest.approx(4e-3)
    assert report.guard is not None
    assert not report.guard.holds
    assert report.guard.evaluations == 0
    assert report.guard.stopped == "the time limit of 0.001 s was reached"
    assert "the layers with the lowest SQNR are" in report.guard.why
    assert report.guard.why in report.summary

    asked = report.next_steps[0].arguments["name"]
    assert "fails the guard" in report.next_steps[0].why
    picked = omgoptim.pick(report.run_id, asked)
    assert picked.outcome == "guard_failed"
    assert picked.summary.startswith("Quality guard failed")
    assert picked.gains is not None
    assert picked.gains.quality_drop is not None
    assert picked.gains.quality_drop > 0
    assert picked.next_steps[0].arguments["name"] == "fp32-on-onnxruntime"


def test_auto_keeps_every_candidate_in_the_report_and_chooses_one_within_the_guard(project: Path) -> None:
    report = omgoptim.quantize("net.py:net", max_quality_drop=0.02, **COMMON)
    statuses = [candidate.status for candidate in report.candidates]
    assert statuses.count("chosen") == 1
    chosen = report.candidates[0]
    assert chosen.status == "chosen"
    assert chosen.quality_drop is not None
    assert chosen.quality_drop <= 0.02
    assert {candidate.name for candidate in report.candidates} >= {
        "static-onnxruntime on onnxruntime",
        "static-nncf on openvino",
        "fp32 on onnxruntime",
        "dynamic on onnxruntime",
        "fp32 on torch_compile",
    }
    assert all(candidate.why for candidate in report.candidates)
    skipped = next(candidate for candidate in report.candidates if candidate.name == "dynamic on onnxruntime")
    assert "convolutions" in skipped.why
    assert report.lineage == [report.run_id]
    assert report.repeat.startswith("omgoptim quantize net.py:net")

    run = project / ".omgoptim/runs" / report.run_id
    known = {one.name for one in report.alternatives} | {report.delivered}
    assert known == {path.stem for path in (run / "alternatives").glob("*.json")}
    for one in report.alternatives:
        assert omgoptim.open_artifact(one.path)
        assert one.command == f"omgoptim pick {report.run_id} {one.name}"
    other = report.alternatives[0]
    picked = omgoptim.pick(report.run_id, other.name)
    assert picked.delivered == other.name
    assert picked.after is not None
    assert (picked.after.quality, picked.after.size_bytes) == (other.quality, other.size_bytes)
    assert picked.candidates[0].name == other.candidate
    assert report.delivered in {one.name for one in picked.alternatives}
    assert picked.artifact is not None
    assert picked.artifact.path == str(run / "artifact")
    assert Manifest.read(run / "artifact").runtime == other.runtime
    assert json.loads((run / "report.json").read_text()) == picked.model_dump(mode="json")
    assert json.loads((run / "state.json").read_text())["summary"] == picked.summary
    assert not Path(other.path).exists()
    assert omgoptim.pick(report.run_id, report.delivered or "") == report
    assert Path(other.path, "manifest.json").is_file()
    with pytest.raises(RunError, match="has no finalist 'nothing'") as caught:
        omgoptim.pick(report.run_id, "nothing")
    assert other.name in caught.value.why


def test_an_artifact_that_is_damaged_before_it_is_measured_fails_the_run(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = artifacts.save_program

    def damaging(folder: Path, *arguments: object) -> None:
        whole(folder, *arguments)  # type: ignore[arg-type]
        program = bytearray((folder / "model.onnx").read_bytes())
        program[len(program) // 2] ^= 0xFF
        (folder / "model.onnx").write_bytes(program)

    monkeypatch.setattr(artifacts, "save_program", damaging)
    with pytest.raises(TechniqueError, match="no candidate could be measured") as caught:
        omgoptim.quantize("net.py:net", scheme="static", runtime="onnxruntime", **COMMON)
    assert "damaged" in caught.value.why
    (run,) = (project / ".omgoptim/runs").iterdir()
    assert not (run / "artifact").exists()
    assert not (run / "report.json").exists()
    assert json.loads((run / "state.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_still_gets_what_torch_can_do(project: Path) -> None:
    (project / "branches.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Branches(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 10)\n"
        "    def forward(self, images):\n"
        "        hidden = self.first(images.flatten(1))\n"
        "        return self.second(hidden if hidden.sum() > 0 else hidden * 2)\n"
    )
    report = omgoptim.quantize("branches.py:Branches", data="net.py:load", timing="quick", max_quality_drop=0.05)
    assert report.after is not None
    assert report.after.runtime == "torch_eager"
    reasons = [c.why for c in report.candidates if c.runtime == "onnxruntime"]
    assert reasons
    assert all("cannot be exported" in why for why in reasons)


def test_a_gru_is_quantized_by_torch_and_comes_back_smaller(project: Path) -> None:
    (project / "gru.py").write_text(
        "from torch import nn\n"
        "class Reader(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.gru, self.head = nn.GRU(8, 96, batch_first=True), nn.Linear(96, 10)\n"
        "    def forward(self, rows):\n"
        "        states, last = self.gru(rows.squeeze(1))\n"
        "        return self.head(states[:, -1]), last\n"
    )
    report = omgoptim.quantize(
        "gru.py:Reader",
        data="net.py:load",
        scheme="dynamic",
        runtime="torch_eager",
        timing="quick",
        max_quality_drop=0.1,
    )
    assert {change.path for change in report.changed} == {"gru", "head"}
    assert report.gains is not None
    assert report.gains.size_ratio is not None
    assert report.gains.size_ratio > 2.5
    assert report.artifact is not None
    scores, last = omgoptim.open_artifact(report.artifact.path)(torch.randn(3, 1, 8, 8))
    assert scores.shape == (3, 10)
    assert last.shape == (1, 3, 96)


def test_without_data_quality_is_agreement_and_no_static_candidate_is_tried(project: Path) -> None:
    report = omgoptim.quantize("net.py:net", inputs=["1x1x8x8"], timing="quick", runtime="onnxruntime")
    assert report.after is not None
    assert report.after.metric == "r2_agreement"  # nothing says that these numbers are scores of classes
    assert any("random" in warning for warning in report.warnings)
    static = [candidate for candidate in report.candidates if candidate.scheme == "static"]
    assert static
    assert all(candidate.status == "skipped" and "data" in candidate.why for candidate in static)


@pytest.mark.usefixtures("project")
def test_layers_that_only_another_runtime_can_leave_alone_are_no_request_for_torch() -> None:
    with pytest.raises(RequestError, match="no candidate is possible") as told:
        omgoptim.quantize("net.py:net", scheme="dynamic", runtime="torch_eager", targets=["8"], plan=True, **COMMON)
    assert "targets and ignore need another runtime" in told.value.why


def test_without_data_a_load_beside_the_model_is_taken_and_that_is_said(project: Path) -> None:
    report = omgoptim.quantize("net.py:net", checkpoint="net.pt", scheme="weight_only", plan=True)
    assert "no data was given: using net.py:load, found beside the model" in report.warnings


def test_a_plan_names_candidates_and_layers_and_leaves_no_artifact(project: Path) -> None:
    report = omgoptim.quantize("net.py:net", plan=True, **COMMON)
    assert report.before is None
    assert report.artifact is None
    assert {candidate.status for candidate in report.candidates} == {"planned", "skipped"}
    assert {change.path for change in report.changed} == {"0", "3", "8"}
    assert not (project / ".omgoptim/runs" / report.run_id / "artifact").exists()


def test_a_run_can_be_profiled_compared_and_copied_out(project: Path) -> None:
    small = omgoptim.quantize("net.py:net", scheme="static", runtime="onnxruntime", output="deploy/small", **COMMON)
    assert (project / "deploy/small/model.onnx").is_file()
    with pytest.raises(RequestError, match="exists already"):
        omgoptim.quantize("net.py:net", scheme="static", output="deploy/small", **COMMON)
    profiled = omgoptim.profile(small.run_id, data="net.py:load", timing="quick")
    assert profiled.before is not None
    assert small.after is not None
    assert profiled.before.quality == pytest.approx(small.after.quality)
    assert profiled.lineage == [small.run_id]
    compared = omgoptim.compare(small.run_id, "deploy/small", timing="quick")
    assert compared.gains is not None
    assert compared.gains.agreement == 1.0
    assert compared.gains.size_ratio == 1.0
    assert compared.before is not None
    assert compared.before.metric == "top1_accuracy"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"scheme": "dynamic", "model": "net.py:conv_only"}, TechniqueError, "static"),
        ({"scheme": "static", "data": "net.py:no_calibration"}, DataError, "calibration"),
        ({"data": "net.py:nothing"}, DataError, "eval"),
        ({"scheme": "static", "runtime": "torch_eager"}, RequestError, "onnxruntime"),
        ({"output": "../elsewhere"}, RequestError, "outside"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(
    project: Path, arguments: dict[str, str], error: type[Exception], words: str
) -> None:
    with (project / "net.py").open("a") as file:
        file.write(
            "\ndef conv_only(): return nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())"
            "\ndef nothing(split): return []"
            "\ndef no_calibration(split): return load(split) if split == 'eval' else []\n"
        )
    request = {"model": "net.py:net", "data": "net.py:load", "timing": "quick"} | arguments
    with pytest.raises(error) as caught:
        omgoptim.quantize(request.pop("model"), **request)
    assert words in str(caught.value)
    assert not list(project.glob(".omgoptim/runs/*/artifact"))


def test_a_damaged_artifact_is_not_opened(project: Path) -> None:
    report = omgoptim.quantize("net.py:net", scheme="fp32", runtime="onnxruntime", **COMMON)
    assert report.artifact is not None
    program = Path(report.artifact.path, "model.onnx")
    program.write_bytes(program.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        omgoptim.open_artifact(report.artifact.path)


@pytest.mark.slow
def test_a_speedup_over_a_model_that_waits_is_called_implausible_and_split(project: Path) -> None:
    (project / "waits.py").write_text(
        "import time\nfrom net import net\nfrom torch import nn\n"
        "class Waits(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = net()\n"
        "    def forward(self, images):\n"
        "        time.sleep(0.05)\n"
        "        return self.body(images)\n"
    )
    report = omgoptim.quantize("waits.py:Waits", data="net.py:load", timing="quick", samples=32, max_quality_drop=1)
    assert report.gains is not None
    assert report.gains_by is not None
    if report.gains.speedup is None:  # others kept the machine busy: nothing is said of speed
        assert "speed undecided" in report.summary
        return
    before, found, _ = report.summary.partition("Implausible speedup: the original waits")
    assert found
    assert "faster" not in before  # what precedes it is that the untrained network is at chance level
    assert report.warnings[0].startswith("Implausible speedup")
    engine, precision = report.gains_by.engine.speedup, report.gains_by.precision.speedup
    assert engine is not None
    assert precision is not None
    assert engine * precision == pytest.approx(report.gains.speedup)
    assert engine > 10 > precision
