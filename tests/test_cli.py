"""Tests of the command line: what it accepts, what goes to which stream, and its exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import by_hand
import pytest
from pydantic import Field
from rich.console import Console

from omgoptim import cli, requests
from omgoptim.cli import options, progress
from omgoptim.errors import RequestError
from omgoptim.jobs.actions import cancel
from omgoptim.jobs.folder import find_run
from omgoptim.jobs.states import list_runs, read_state
from omgoptim.reports import RunState
from omgoptim.requests import ModelRequest, Params, PruneRequest, QuantizeRequest, Request, TrainingRequest
from omgoptim.requests.command import in_shell
from omgoptim.requests.quantize import Bf16

ROOT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project that is the working directory."""
    for name in ("OMGOPTIM_PROJECT", "CLAUDE_PROJECT_DIR", "OMGOPTIM_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process(arguments: list[str], project: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMGOPTIM_PYTHON": sys.executable}
    command = [sys.executable, "-m", "omgoptim.cli", *arguments]
    return subprocess.Popen(
        command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


# What it accepts


@pytest.mark.parametrize("verb", requests.VERBS)
def test_every_field_and_every_parameter_of_a_technique_is_an_option(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = requests.VERBS[verb]
    fields = {**request.model_fields}
    for params in requests.techniques(request).values():
        fields |= {
            name: field for name, field in params.model_fields.items() if not (params.by_source and name == "source")
        }
    assert {option.name for option in options.options_of(request)} == {*fields, *request.aliases}
    assert cli.run([verb, "--help"]) == 0
    text = capsys.readouterr().out
    places = {name: other for other, name in request.aliases.items()}
    for name, field in fields.items():
        assert (places.get(name, name).upper() if field.is_required() else f"--{name.replace('_', '-')}") in text
    assert all(f"--{other}" in text for other in request.aliases)


class Odd(Params):
    """Do something odd."""

    scheme: Literal["odd"] = "odd"
    strength: float = Field(0.5, ge=0)
    """Degree of oddness."""
    careful: bool = True


class OddRequest(Request):
    model: str
    scheme: Odd | Bf16 = Field(Odd(), discriminator="scheme")
    names: list[str] = []
    sizes: dict[str, int] = {}


def test_a_technique_and_a_field_that_nobody_has_heard_of_become_options() -> None:
    by_name = {option.name: option for option in options.options_of(OddRequest)}
    assert next(iter(by_name)) == "model"
    assert by_name["strength"].help == "Degree of oddness."
    assert by_name["strength"].panel == "Scheme odd"
    assert by_name["scheme"].metavar == "odd|bf16"
    given = {"strength": "0.25", "names": ["a", "b"], "sizes": ["x=1", 'y="z"'], "careful": False, "model": None}
    raw = options.given_arguments(OddRequest, given)
    assert raw == {"strength": 0.25, "names": ["a", "b"], "sizes": {"x": 1, "y": "z"}, "careful": False}


def test_options_reach_the_request_as_they_would_from_any_interface() -> None:
    given = {
        "model": "net.py:build",
        "model_kwargs": ["width=64", "name=big", "deep=true"],
        "inputs": ["1x3", "int64:1x4"],
        "batch": "8",
        "max_quality_drop": "0.02",
        "scheme": "static",
        "calibration_samples": "64",
        "num_bits": "8",
        "symmetric": True,
        "plan": None,
    }
    parsed = requests.parse("quantize", options.given_arguments(QuantizeRequest, given))
    direct = requests.parse(
        "quantize",
        {
            "model": "net.py:build",
            "model_kwargs": {"width": 64, "name": "big", "deep": True},
            "inputs": ["1x3", "int64:1x4"],
            "batch": 8,
            "max_quality_drop": 0.02,
            "scheme": {"scheme": "static", "calibration_samples": 64, "num_bits": 8, "symmetric": True},
        },
    )
    assert parsed == direct


def test_a_flag_that_is_not_off_by_default_can_be_turned_off() -> None:
    by_name = {option.name: option for option in options.options_of(QuantizeRequest)}
    for name in ("equalize", "bias_correction", "distill"):
        shown, hidden = by_name[name].parameters()
        assert [shown.name, hidden.name] == [name, f"no_{name}"]
        assert shown.default.metavar == f"/--no-{name.replace('_', '-')}"
    assert [parameter.name for parameter in by_name["symmetric"].parameters()] == ["symmetric"]
    assert options.given_arguments(QuantizeRequest, {"no_equalize": True, "distill": True, "no_distill": None}) == {
        "equalize": False,
        "distill": True,
    }


def test_the_verbs_own_options_come_first_then_those_of_its_techniques_and_the_shared_ones_in_panels() -> None:
    by_name = {option.name: option.panel for option in options.options_of(PruneRequest)}
    assert by_name["method"] is by_name["rounds"] is by_name["max_quality_drop"] is None
    assert by_name["sparsity"] == "Common to several methods"
    assert by_name["pruning_ratio"] == "Method structured"
    training = set(TrainingRequest.model_fields) - set(ModelRequest.model_fields)
    assert {by_name[name] for name in training} == {"Training"}
    panels = list(dict.fromkeys(by_name.values()))
    of_techniques = ["Common to several methods", "Method structured", "Method semi_structured"]
    shared = ["Training", "Model and data", "Measurement", "Project and permissions", "Output"]
    assert panels == [None, *of_techniques, *shared]
    assert [by_name[name] for name in ("data", "timing", "allow_path", "plan")] == shared[1:]


def test_the_help_names_no_type_of_a_flag_of_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["quantize", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "<bool>" in line and "--help" not in line] == []
    assert any("--equalize" in line and "/--no-equalize" in line for line in lines)


def test_what_differs_between_techniques_is_told_for_each() -> None:
    by_name = {option.name: option for option in options.options_of(PruneRequest)}
    scope, score = by_name["scope"], by_name["score"]
    assert scope.default_text == "global (wanda: per_row)"
    assert scope.help.startswith("(magnitude, gradient, random) Rank weights over all selected layers")
    assert "(wanda) Rank weights within each output row" in scope.help
    assert scope.help.endswith("One of: global, per_layer, per_row.")
    assert score.default_text == "sensitivity (semi_structured: magnitude)"
    assert by_name["targets"].help == "Globs on module paths: prune only these. Repeatable."
    assert by_name["prune_heads"].default_text == "on"


def test_keyword_arguments_may_be_one_json_object_as_in_the_command_that_repeats_a_run() -> None:
    raw = options.given_arguments(QuantizeRequest, {"model_kwargs": ['{"width": 64}']})
    assert raw == {"model_kwargs": {"width": 64}}
    with pytest.raises(RequestError, match="not KEY=VALUE"):
        options.given_arguments(QuantizeRequest, {"model_kwargs": ["width"]})


# How it refuses


@pytest.mark.parametrize(
    ("verb", "words", "raw"),
    [
        ("quantize", ["m", "--bits", "4"], {"model": "m", "bits": "4"}),
        ("quantize", [], {}),
        ("compare", ["one"], {"a": "one"}),
        ("quantize", ["m", "--scheme", "statik"], {"model": "m", "scheme": "statik"}),
        ("quantize", ["m", "--scheme", "bf16", "--symmetric"], {"model": "m", "scheme": "bf16", "symmetric": True}),
        ("profile", ["m", "--batch", "0"], {"model": "m", "batch": 0}),
        ("profile", ["m", "--batch", "many"], {"model": "m", "batch": "many"}),
        ("profile", ["m", "--batch", "true"], {"model": "m", "batch": "true"}),
        ("profile", ["m", "--inputs", "1xx3"], {"model": "m", "inputs": ["1xx3"]}),
        ("runs", ["show"], {"action": "show"}),
        ("runs", ["resume"], {"action": "resume"}),
        ("prune", ["m", "--scope", "global"], {"model": "m", "scope": "global"}),
        (
            "prune",
            ["m", "--method", "magnitude", "--sparsity", "1"],
            {"model": "m", "method": "magnitude", "sparsity": 1},
        ),
        ("prune", ["m", "--schedule", "0.2,0.4"], {"model": "m", "schedule": "0.2,0.4"}),
        ("prune", ["m", "--recover", "some"], {"model": "m", "recover": "some"}),
        ("factorize", ["m", "--rank", "4", "--energy", "0.9"], {"model": "m", "rank": 4, "energy": 0.9}),
    ],
)
def test_a_bad_request_is_refused_in_the_words_of_the_request(
    verb: str, words: list[str], raw: dict[str, Any], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError) as refused:
        requests.parse(verb, raw)
    assert cli.run([verb, *words, "--json"]) == 2
    streams = capsys.readouterr()
    expected = refused.value.to_dict()
    assert json.loads(streams.out) == {"error": expected | {"fix": in_shell(expected["fix"])}}
    assert streams.err.startswith(f"error: {refused.value.what}")
    assert list(project.iterdir()) == []


def test_an_unknown_action_is_refused_with_those_of_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["runs", "stop"]) == 2
    assert "cancel, list, open, pick, resume, show, wait, watch" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["quantise", "m"], ["quantize", "m", "extra"], ["mcp", "--port", "many"]])
def test_a_usage_error_is_a_bad_request(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "--help lists the commands" in streams.err


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--json", "quantise", "m"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["what"] == "unknown command 'quantise'"
    assert error["why"].startswith("Did you mean 'quantize'?")


def test_a_python_that_does_not_exist_is_a_matter_of_set_up(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "net.py").write_text("def build(): ...")
    assert cli.run(["profile", "net.py:build", "--python", "no/such/python", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "SetupError"


def test_a_detail_that_does_not_exist_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["profile", "net.py:build", "--detail", "long"]) == 2
    assert "Known: brief, full." in capsys.readouterr().err


# Reports


def test_json_is_the_report_and_nothing_else(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.finished_run(project, by_hand.report())
    assert cli.run(["runs", "show", folder.id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(folder.report_file.read_text())


def test_the_short_json_says_where_the_rest_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.finished_run(project, by_hand.report())
    assert cli.run(["runs", "wait", folder.id[-4:], "--json", "--detail", "brief"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"]["report"] == str(folder.report_file)
    assert "environment" not in answer


@pytest.mark.parametrize(("outcome", "code"), [("ok", 0), ("no_gain", 0), ("guard_failed", 4)])
def test_only_a_failed_guard_makes_a_finished_run_a_failure(
    outcome: str, code: int, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = by_hand.finished_run(project, by_hand.report(outcome=outcome))
    assert cli.run(["runs", "wait", folder.id]) == code
    streams = capsys.readouterr()
    assert "5.79x" in streams.out
    assert folder.id in streams.err


def test_a_plan_is_shown_without_numbers(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.finished_run(project, by_hand.report("planned"))
    assert cli.run(["runs", "show", folder.id]) == 0
    text = capsys.readouterr().out
    assert "PLAN" in text
    assert "speedup" not in text


# Runs


def test_a_failed_run_is_an_error_in_its_own_words(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.failed_run(project)
    assert cli.run(["runs", "show", folder.id, "--json"]) == 3
    streams = capsys.readouterr()
    assert json.loads(streams.out)["error"]["what"].startswith("the model")
    assert "fix: a way out" in streams.err
    assert "\x1b" not in streams.err


def test_a_running_run_shows_where_it_stands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand.running_run(project)
    assert cli.run(["runs", "show", folder.id]) == 0
    assert "measuring, 40%, 12 s left" in capsys.readouterr().out
    assert cli.run(["runs", "show", folder.id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "running"


def test_the_list_has_every_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["runs"]) == 0
    assert "No runs yet" in capsys.readouterr().out
    folders = [by_hand.finished_run(project, by_hand.report()), by_hand.failed_run(project)]
    assert cli.run(["runs", "list"]) == 0
    text = capsys.readouterr().out
    assert all(folder.id in text for folder in folders)
    assert cli.run(["runs", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert {state["run_id"] for state in listed} == {folder.id for folder in folders}


def test_a_run_that_does_not_exist_is_an_error_of_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["runs", "cancel", "nope"]) == 3
    assert "there is no run 'nope'" in capsys.readouterr().err


def test_elsewhere_than_on_a_terminal_each_stage_is_told_once() -> None:
    console = Console(file=io.StringIO(), width=80)
    record = {"run_id": "r", "verb": "profile", "started": "t", "updated": "t", "folder": "/p", "status": "running"}
    with progress.display(console) as shown:
        for stage in ("measuring: 1 of 5", "measuring: 2 of 5", "saving"):
            shown(RunState.model_validate(record | {"stage": stage, "progress": 0.5}))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "measuring: 1 of 5, 50%\nsaving, 50%\n"


def test_on_a_terminal_there_is_a_bar_that_takes_any_stage_as_plain_text() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    record = {"run_id": "r", "verb": "profile", "started": "t", "updated": "t", "folder": "/p", "status": "running"}
    with progress.display(console) as shown:
        shown(RunState.model_validate(record | {"stage": "loading [bold]net[/bold]"}))
        shown(RunState.model_validate(record | {"stage": "loading [bold]net[/bold]", "progress": 0.25, "eta_s": 9}))
    assert isinstance(console.file, io.StringIO)
    assert "loading [bold]net[/bold]" in console.file.getvalue()
    assert "25%, 9 s left" in console.file.getvalue()


# Real processes


def test_no_wait_prints_the_id_and_the_run_can_be_cancelled(project: Path) -> None:
    (project / "sleeper.py").write_text(by_hand.SLEEPER)
    with process(["profile", "sleeper.py:build", "--inputs", "1x3", "--no-wait"], project) as started:
        out, _ = started.communicate(timeout=60)
    folder = find_run(project, out.strip())
    assert read_state(folder).status in ("starting", "queued", "running")
    with process(["runs", "cancel", folder.id, "--json"], project) as cancelling:
        cancelled, _ = cancelling.communicate(timeout=60)
    assert json.loads(cancelled)["status"] == "cancelled"
    assert read_state(folder).status == "cancelled"


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
def test_interrupting_cancels_the_run_and_says_so(project: Path) -> None:
    (project / "sleeper.py").write_text(by_hand.SLEEPER)
    with process(["profile", "sleeper.py:build", "--inputs", "1x3", "--json"], project) as started:
        assert started.stderr is not None
        try:
            shown = ""
            while "loading" not in shown:  # a stage that only a living worker sets
                shown = started.stderr.readline()
                assert shown, "it ended before it could be interrupted"
            started.send_signal(signal.SIGINT)
            out, err = started.communicate(timeout=60)
        finally:
            for state in list_runs(project):
                cancel(find_run(project, state.run_id))
    assert started.returncode == 130
    assert "cancelled run profile-" in err
    assert json.loads(out)["error"]["what"].startswith("cancelled run profile-")
    assert [state.status for state in list_runs(project)] == ["cancelled"]


def test_a_run_that_fails_ends_with_its_error_on_both_streams(project: Path) -> None:
    with process(["profile", "nowhere.py:build", "--inputs", "1x3", "--json"], project) as failing:
        out, err = failing.communicate(timeout=60)
    assert failing.returncode == 3
    assert "nowhere.py" in json.loads(out)["error"]["what"]
    assert "error: " in err


def test_the_command_line_loads_neither_torch_nor_mcp(project: Path) -> None:
    code = (
        "import sys; from omgoptim import cli; cli.run(['quantize', '--help']); cli.run(['runs']);"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "typer" in loaded
    assert loaded & {"torch", "numpy", "mcp", "onnx", "onnxruntime"} == set()


def test_without_a_command_it_shows_its_help_and_with_version_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "quantize" in capsys.readouterr().out
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == cli.__version__


def test_doctor_says_what_this_python_has(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "--json", "--python", sys.executable]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["project"] == str(project)
    assert {"onnxruntime"} <= {runtime["name"] for runtime in report["runtimes"]}


def test_a_project_with_a_name_of_any_length_or_kind_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (("x" * 5000, "too long"), ("x" * 3000, "does not exist"), ("a\nb", "invisible character")):
        for arguments in (["runs", "list"], ["profile", "net.py:build"], ["doctor"]):
            assert cli.run([*arguments, "--project", name, "--json"]) == 2
            error = json.loads(capsys.readouterr().out)["error"]
            assert words in error["what"]
            assert len(error["what"]) < 300


def test_a_mapping_that_is_nested_without_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for depth in (50, 200_000):
        nested = "[" * depth + "]" * depth
        for given in (f"a={nested}", f'{{"a": {nested}}}'):
            assert cli.run(["profile", "net.py:build", "--model-kwargs", given, "--json"]) == 2
            assert "nested too deep" in json.loads(capsys.readouterr().out)["error"]["what"]
