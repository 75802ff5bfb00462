"""Every verb on small networks with one trap each: a true report, or an error of a kind of its own.

Runs are made in this process, as a notebook makes them. On two cores that other work shares a sweep of quantize took
16 minutes, of prune 9, of magnitude pruning 12 (7 to 13 s an entry), of factorize 15, and of distill 18.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo.nets import ENTRIES, Entry

import omgoptim
from omgoptim.errors import OmgoptimError
from omgoptim.render.brief import to_json
from omgoptim.reports import EfficiencyReport, OutputRecord
from omgoptim.requests import parse
from omgoptim.requests.command import command_of
from omgoptim.runtimes.signature import flatten

pytestmark = pytest.mark.filterwarnings("ignore")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICK: dict[str, Any] = {"timing": "quick", "threads": 1, "batch": 8}
TRAINED = {**QUICK, "epochs": 1, "max_quality_drop": 1.0}
VERBS: dict[str, dict[str, Any]] = {
    "profile": QUICK,
    "quantize": {**QUICK, "runtime": "onnxruntime", "effort": "fast", "max_quality_drop": 1.0},
    "prune": {**TRAINED, "method": {"method": "structured", "pruning_ratio": 0.3}},
    "prune_magnitude": {**TRAINED, "method": {"method": "magnitude", "sparsity": 0.5}},
    "factorize": {**TRAINED, "rank_ratio": 0.5},
    "distill": {**TRAINED, "student": "narrow"},
}
EVERY_VERB = dict.fromkeys(("string_output", "lazy", "random_in_eval", "changes_its_input", "raises"), "ModelError")
NOT_FLOAT32 = dict.fromkeys(("float64", "bfloat16", "float16"), "RequestError")
NO_LAYERS = dict.fromkeys(
    ("no_parameters", "one_parameter", "identity", "raw_parameters", "tied_weights", "frozen"), "TechniqueError"
)
NO_CHANNELS = (
    EVERY_VERB
    | NOT_FLOAT32
    | NO_LAYERS
    | dict.fromkeys(("batch_second", "token_ids", "embedding_bag", "attention", "bilinear"), "TechniqueError")
    | dict.fromkeys(("weight_norm", "spectral_norm", "orthogonal", "old_weight_norm"), "TechniqueError")
    | dict.fromkeys(("lstm", "lstm_projected", "lstm_both_ways", "gru_time_first", "plain_rnn"), "TechniqueError")
    | dict.fromkeys(("gru_cell_with_state", "infinite", "branches", "in_place", "complex_output"), "TechniqueError")
)
REFUSED: dict[str, dict[str, str]] = {
    "profile": EVERY_VERB,
    "quantize": EVERY_VERB
    | dict.fromkeys(
        ("mixed_precision", "orthogonal", "lstm_projected", "nested", "branches", "complex_output"), "TechniqueError"
    ),
    "prune": NO_CHANNELS,
    "prune_magnitude": EVERY_VERB
    | NOT_FLOAT32
    | NO_LAYERS
    | {"in_place": "ModelError", "bilinear": "TechniqueError", "complex_output": "TechniqueError"}
    | {"infinite": "DataError"},
    "factorize": EVERY_VERB
    | NOT_FLOAT32
    | NO_LAYERS
    | dict.fromkeys(("conv1d", "attention", "gru_cell_with_state", "bilinear", "complex_output"), "TechniqueError")
    | dict.fromkeys(("lstm", "lstm_projected", "lstm_both_ways", "gru_time_first", "plain_rnn"), "TechniqueError")
    | {"in_place": "ModelError", "infinite": "DataError"},
    "distill": NO_CHANNELS,
}
"""The kind of error with which a verb refuses an entry."""

UNNAMED = {
    ("quantize", "raw_parameters"): "changed names the nodes of the program, not the parameters",
    ("quantize", "infinite"): "nothing was quantized",
}
"""Where a layer is neither among what changed nor among what was skipped: gaps, to be closed."""

IN_EVERY_SUITE = (
    ("quantize", "dict_out"),
    ("prune", "residual"),
    ("prune_magnitude", "branches"),
    ("factorize", "residual"),
)
"""Runs that `make test` makes too, one of a verb."""

IN_A_SHELL = (
    ("profile", "printing", 1.0, 0),
    ("profile", "raises", 1.0, 3),
    ("quantize", "dict_out", 1.0, 0),
    ("quantize", "complex_output", 1.0, 3),
    ("prune", "residual", 1.0, 0),
    ("prune", "concatenated", 0.0, 4),
    ("prune", "float64", 1.0, 2),
    ("prune", "lstm", 1.0, 3),
    ("factorize", "several_inputs", 0.0, 4),
    ("factorize", "no_parameters", 1.0, 3),
    ("distill", "namedtuple_out", 1.0, 0),
    ("distill", "keyword_only", 0.0, 4),
    ("distill", "bfloat16", 1.0, 2),
    ("distill", "random_in_eval", 1.0, 3),
)
"""Runs of a shell: verb, entry, quality guard and exit code."""

SAMPLE = ("dict_out", "none_in_tuple", "bfloat16", "tied_weights", "norm_without_stats", "gru_cell_with_state")
"""Entries that `make test` profiles too."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "nets.py").write_text((HERE / "nets.py").read_text())
    return folder


@pytest.fixture(autouse=True)
def _in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(project))


def attempt(verb: str, name: str) -> EfficiencyReport | OmgoptimError:
    """The report of a run, or the error that it ended with."""
    try:
        report = getattr(omgoptim, verb.partition("_")[0])(
            f"nets.py:build_{name}", data=f"nets.py:load_{name}", progress=False, **VERBS[verb]
        )
    except OmgoptimError as error:
        return error
    assert isinstance(report, EfficiencyReport)
    return report


def one_by_one(call: Callable[..., Any], entry: Entry) -> list[list[np.ndarray]]:
    """Per sample the flat list of outputs of a model, run at batch 1."""
    found = []
    for inputs, _ in entry.load("eval").rows:
        with torch.no_grad():
            if isinstance(inputs, dict):
                answer = call(**{key: value[None].clone() for key, value in inputs.items()})
            else:
                given = inputs if isinstance(inputs, tuple) else (inputs,)
                answer = call(*(value[None].clone() for value in given))
        found.append([leaf.float().numpy() if leaf.is_floating_point() else leaf.numpy() for leaf in flatten(answer)])
    return found


def agreement(record: OutputRecord, made: np.ndarray, truth: np.ndarray) -> float:
    """The agreement of rows of outputs (N, entries) as the report's field says that it is computed."""
    if record.compared_by == "exact_agreement":
        return float((made == truth).mean())
    if record.compared_by == "top1_agreement":
        return float((made.argmax(1) == truth.argmax(1)).mean())
    same = np.isinf(made) & (made == truth)
    made, truth = np.where(same, 0, made).astype(np.float64), np.where(same, 0, truth).astype(np.float64)
    variance = truth.var(0, ddof=1, dtype=np.float64).mean()
    return max(0.0, float(1 - ((made - truth) ** 2).mean() / variance))


def check(report: EfficiencyReport, entry: Entry) -> None:
    """What a report says of each output is what the reopened artifact gives."""
    assert json.loads(json.dumps(to_json(report)))["run_id"] == report.run_id
    assert report.outputs
    assert all(skip.reason for skip in report.skipped)
    if report.artifact is None:
        return
    assert all(record.reopened is not None and record.reopened < 1e-3 for record in report.outputs)
    made = one_by_one(omgoptim.open_artifact(report.run_id), entry)
    original = one_by_one(entry.build(), entry)
    assert [len(sample) for sample in made] == [len(sample) for sample in original]
    assert report.after is not None
    tolerance = 2e-3 if report.after.precision == "float32" else 0.05
    for index, record in enumerate(report.outputs):
        truth = np.stack([sample[index].reshape(-1) for sample in original])
        if record.agreement is None or not truth.size or (truth == truth[:1]).all():
            continue
        rows = np.stack([sample[index].reshape(-1) for sample in made])
        assert agreement(record, rows, truth) == pytest.approx(record.agreement, abs=tolerance), record.name


def check_layers_are_named(report: EfficiencyReport, net: nn.Module) -> None:
    """Each layer with a matrix of weights is said to be changed, or skipped with a reason."""
    said = [change.path for change in report.changed] + [skip.path for skip in report.skipped]
    for path, module in net.named_modules():
        weights = [p for p in module._parameters.values() if p is not None and p.ndim > 1]
        named = any(not path or f"{each}.".startswith(f"{path}.") or path.startswith(f"{each}.") for each in said)
        assert not weights or named, f"{path} is neither changed nor skipped"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_profile_has_numbers_for_every_kind_of_output(name: str) -> None:
    report = attempt("profile", name)
    assert isinstance(report, EfficiencyReport), report
    check(report, ENTRIES[name])
    assert len(report.outputs) == len(one_by_one(ENTRIES[name].build(), ENTRIES[name])[0])


def check_run(name: str, verb: str) -> EfficiencyReport | None:
    """Make a run and check what it says; None where it is refused with an error of the expected kind."""
    answer = attempt(verb, name)
    if isinstance(answer, OmgoptimError):
        assert type(answer) is not OmgoptimError, answer
        assert answer.exit_code in (2, 3)
        assert answer.what
        if verb in REFUSED:
            assert type(answer).__name__ == REFUSED[verb].get(name), answer
        return None
    assert name not in REFUSED.get(verb, {}), f"{verb} takes {name} now: remove it from REFUSED"
    check(answer, ENTRIES[name])
    if verb != "profile" and (verb, name) not in UNNAMED:
        check_layers_are_named(answer, ENTRIES[name].build())
    return answer


def check_comparison(name: str, report: EfficiencyReport) -> None:
    """Compare the float32 program with a result: the agreement of each output is what the result's run gave.

    The run of a profile keeps no artifact, so that the float32 program stands for the original.
    """
    assert report.artifact is not None
    plain = [other.path for other in report.alternatives if other.precision == "float32"]
    original = plain[0] if plain else report.artifact.path
    compared = omgoptim.compare(original, report.run_id, data=f"nets.py:load_{name}", progress=False, **QUICK)
    if not plain:  # float32 itself was delivered
        assert all(record.agreement in (None, 1.0) for record in compared.outputs)
        return
    found = {record.name: record.agreement for record in compared.outputs}
    said = {record.name: record.agreement for record in report.outputs}
    assert found == pytest.approx(said, abs=0.01)


@pytest.mark.parametrize(("verb", "name"), IN_EVERY_SUITE)
def test_a_verb_gives_a_true_report_on_a_network_with_a_trap(verb: str, name: str) -> None:
    assert check_run(name, verb) is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tuple_out", "dict_out", "shared_module", "float64"])
def test_a_comparison_with_the_original_agrees_with_the_runs_own_report(name: str) -> None:
    report = check_run(name, "quantize")
    assert report is not None
    check_comparison(name, report)


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "name", "guard", "code"), IN_A_SHELL)
def test_a_shell_gets_one_json_object_and_the_exit_code_of_its_outcome(
    verb: str, name: str, guard: float, code: int
) -> None:
    given = {**VERBS[verb], "model": f"nets.py:build_{name}", "data": f"nets.py:load_{name}"}
    if "max_quality_drop" in given:
        given["max_quality_drop"] = guard
    words = shlex.split(command_of(verb, parse(verb, given)))[1:]
    shell = [sys.executable, "-c", "from omgoptim.cli import main; main()", *words, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(shell, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == code, ended.stderr
    answer = json.loads(ended.stdout)  # one object: a second would not parse
    if code in (2, 3):
        assert answer["error"]["what"]
        assert "itself failed" not in answer["error"]["what"]
    else:
        assert (answer["outcome"] == "guard_failed") == (code == 4)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_verb_gives_a_true_report_or_an_error_of_a_kind_of_its_own(name: str, verb: str) -> None:
    check_run(name, verb)
