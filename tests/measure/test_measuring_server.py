"""Commands of the measuring process on an opened artifact."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.measure.measuring_server import (
    MIN_SAMPLE_S,
    WARM_UP_FRACTION,
    MeasuringServer,
    _core_share,
    peak_resident_bytes,
    serve,
)
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes import Session

MODULES_LOADED = (
    IMPORT_OMGOPTIM
    + """
from omgoptim.measure.measuring_server import MeasuringServer
server = MeasuringServer()
import os
policy = {"project": os.path.dirname(sys.argv[2]), "allowed": [], "modules": [], "trusted": True}
server.open(sys.argv[2], 1, None, policy, {"latency": sys.argv[3]})
server.warm("latency")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
)


def modules_loaded_for(artifact, batch, folder):
    command = [sys.executable, "-c", MODULES_LOADED, str(PACKAGE_FILE), str(artifact), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return set(done.stdout.split())


@pytest.mark.parametrize(("runtime", "other"), [("onnxruntime", "openvino"), ("openvino", "onnxruntime")])
def test_a_programs_process_imports_its_engine_and_neither_torch_nor_another(
    make_program, batches, tmp_path, runtime, other
):
    pytest.importorskip(runtime)
    loaded = modules_loaded_for(make_program("artifact", runtime=runtime), batches["latency"], tmp_path)
    assert runtime in loaded
    assert not loaded & {"torch", "onnx", "nncf", other}


def test_a_modules_process_imports_torch_and_no_other_engine(make_module, batches, tmp_path):
    loaded = modules_loaded_for(make_module("artifact"), batches["latency"], tmp_path)
    assert "torch" in loaded
    assert not loaded & {"onnxruntime", "openvino", "nncf", "thop"}


class FakeTime:
    """A session whose calls take the given time, on a clock that only they move."""

    def __init__(self, monkeypatch, *, cold=0.0, cold_calls=0, warm=0.001):
        self.now, self.cold, self.cold_calls, self.warm = 0.0, cold, cold_calls, warm
        self.samples = []
        monkeypatch.setattr("omgoptim.measure.measuring_server.time.perf_counter", lambda: self.now)
        self.server = MeasuringServer()
        self.server.prepared["x"] = None
        self.server.session = Session(lambda batch: batch, lambda _: None, lambda _: [], self.seconds)

    def seconds(self, prepared, calls):
        spent = 0.0
        for _ in range(calls):
            spent += self.cold if self.cold_calls > 0 else self.warm
            self.cold_calls -= 1
        self.now += spent
        self.samples.append(calls)
        return spent / calls


def test_the_first_quarter_of_a_turn_is_not_counted(monkeypatch):
    time = FakeTime(monkeypatch, cold=0.02, cold_calls=3, warm=0.002)
    answer = time.server.turn("x", seconds=0.2)
    assert answer["p50"] == answer["p90"] == pytest.approx(0.002)
    assert 0.7 * 75 <= answer["calls"] <= 75 + 5
    assert WARM_UP_FRACTION == 0.25


def test_a_turn_gives_median_and_90th_percentile_of_what_counts(monkeypatch):
    time = FakeTime(monkeypatch)
    durations = iter([0.001] * 5 + [0.003, 0.001] * 1000)
    time.seconds = lambda prepared, calls: next(durations)

    def clock(prepared, calls):
        spent = time.seconds(prepared, calls)
        time.now += spent
        time.samples.append(spent)
        return spent

    time.server.session = Session(lambda b: b, lambda _: None, lambda _: [], clock)
    answer = time.server.turn("x", seconds=0.4)
    kept = time.samples[-answer["calls"] :]
    assert answer["p50"] == pytest.approx(np.median(kept))
    assert answer["p90"] == pytest.approx(np.quantile(kept, 0.9)) == pytest.approx(0.003)


def test_a_call_longer_than_the_turn_is_still_counted_once(monkeypatch):
    time = FakeTime(monkeypatch, warm=5.0)
    assert time.server.turn("x", seconds=0.1)["p50"] == pytest.approx(5.0)


def test_of_slow_calls_the_first_is_the_part_that_is_dropped(monkeypatch):
    time = FakeTime(monkeypatch, cold=0.5, cold_calls=1, warm=0.3)
    answer = time.server.turn("x", seconds=0.3)
    assert (answer["p50"], answer["calls"], len(time.samples)) == (pytest.approx(0.3), 1, 2)


@pytest.mark.parametrize(
    ("busy", "core", "idle"), [(1.5, 1.0, 0.0), (0.02, 1.0, 0.98), (0.2, 0.2, 0.0), (0.01, 0.2, 0.95)]
)
def test_a_turn_reports_the_time_without_work_against_what_a_core_gives_now(monkeypatch, busy, core, idle):
    time = FakeTime(monkeypatch)
    monkeypatch.setattr("omgoptim.measure.measuring_server.time.process_time", lambda: busy * time.now)
    monkeypatch.setattr("omgoptim.measure.measuring_server._core_share", lambda: core)
    assert time.server.turn("x", seconds=0.1)["idle"] == pytest.approx(idle)


def test_the_share_of_a_core_is_a_fraction():
    assert 0 < _core_share() <= 1


def test_calls_too_short_for_the_clock_are_timed_several_at_a_time(monkeypatch):
    time = FakeTime(monkeypatch, warm=1e-5)
    answer = time.server.turn("x", seconds=0.01)
    assert set(time.samples[1:]) == {round(MIN_SAMPLE_S / 1e-5)}
    assert answer["p50"] == pytest.approx(1e-5)
    assert answer["calls"] > 500


def test_warming_up_goes_on_until_the_time_per_call_settles(monkeypatch):
    time = FakeTime(monkeypatch, cold=0.3, cold_calls=1, warm=0.001)
    assert time.server.warm("x")["call_s"] == pytest.approx(0.001)


def test_warming_up_ends_for_a_model_that_never_settles(monkeypatch):
    time = FakeTime(monkeypatch)
    growing = iter(0.1 * 1.5**n for n in range(100))

    def clock(prepared, calls):
        spent = next(growing)
        time.now += spent
        return spent

    time.server.session = Session(lambda b: b, lambda _: None, lambda _: [], clock)
    assert time.server.warm("x")["call_s"] < 10


def test_peak_memory_grows_with_what_is_held():
    before = peak_resident_bytes()
    held = np.ones(40_000_000)  # 320 MB, and written to
    assert peak_resident_bytes() >= before
    assert peak_resident_bytes() > held.nbytes


def answers_to(*requests):
    answers = io.StringIO()
    serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_command_that_fails_is_answered_and_the_next_one_works(make_program, tmp_path, capsys):
    artifact = make_program("artifact")
    opening = {"command": "open", "threads": 1, "device": None, "policy": PathPolicy(tmp_path).to_json(), "batches": {}}
    failed, bad, opened, memory = answers_to(
        opening | {"artifact": str(tmp_path / "nowhere")},
        {"command": "warm", "batch": "latency"},
        opening | {"artifact": str(artifact)},
        {"command": "memory"},
    )
    assert failed["error"]["kind"] == "ArtifactError"
    assert bad["error"]["what"] == "the engine failed on the artifact"
    assert "Traceback" in capsys.readouterr().err
    assert opened["differences"] == [0]
    assert memory["peak_bytes"] == peak_resident_bytes()


def test_outputs_of_an_unknown_file_are_an_error_and_write_nothing(make_program, tmp_path: Path, capsys):
    opening = {"command": "open", "artifact": str(make_program("artifact")), "threads": 1, "device": None}
    opening["policy"] = PathPolicy(tmp_path).to_json()
    wanted = {"command": "outputs", "inputs": str(tmp_path / "none.npz"), "target": str(tmp_path / "out.npz")}
    assert "FileNotFoundError" in answers_to(opening | {"batches": {}}, wanted)[1]["error"]["why"]
    assert not (tmp_path / "out.npz").exists()
