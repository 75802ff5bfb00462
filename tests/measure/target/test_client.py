"""Measuring on a target over a real SSH server: the same results, lost connections, turns."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest

from omgoptim.errors import ArtifactError, SetupError
from omgoptim.measure.launch import LATENCY, TimingPlan
from omgoptim.measure.target import client
from omgoptim.measure.target.client import TargetGone
from omgoptim.measure.target.connection import Connection
from omgoptim.measure.timing import PLANS, Timing, time_artifacts

TINY = TimingPlan(launches=1, most_launches=1, rounds=2, turn_s=0.01, throughput_rounds=1)
TWO = replace(TINY, launches=2, most_launches=2)


@pytest.fixture
def there(server, connect, bench):
    """The setup of a timing on the target."""
    return replace(bench, target=connect(server))


def samples(folder, count=2):
    folder.mkdir()
    for index in range(count):
        np.savez(folder / f"{index}.npz", x=np.random.default_rng(index).normal(size=(3, 4)).astype(np.float32))
    return folder


def arrays(folder):
    return [{name: array.tolist() for name, array in np.load(path).items()} for path in sorted(folder.iterdir())]


def test_what_is_measured_there_is_what_is_measured_here(there, server, make_program, bench, tmp_path):
    artifacts = [make_program("a"), make_program("b", factor=3.0)]
    inputs, before = samples(tmp_path / "inputs"), set(server.processes())
    ran = []

    def evaluate(where):
        def on_first(index, process):
            ran.append(set(server.processes()) - before)
            process.run_samples(inputs, tmp_path / f"{where}-{index}")

        return on_first

    local = time_artifacts(artifacts, bench, TWO, 0, on_first=evaluate("here"))
    assert ran == [set(), set()]
    remote = time_artifacts(artifacts, there, TWO, 0, on_first=evaluate("there"))
    assert all(len(pids) >= 2 for pids in ran[2:])
    assert set(server.processes()) == before
    assert [path.name for path in server.home.iterdir()] == [".cache"]
    assert [path.name for path in (server.home / ".cache").iterdir()] == ["omgoptim"]
    for one, other in zip(local, remote, strict=True):
        assert isinstance(other, Timing)
        assert other.launches == one.launches == 2
        assert other.reopened == one.reopened
        for name in ("latency_ms_p50", "latency_ms_p90", "throughput_per_s", "peak_memory_bytes", "calls"):
            assert getattr(other, name) > 0, name
    assert remote[0].speedup is None
    assert remote[1].speedup.low < remote[1].speedup.value < remote[1].speedup.high
    for index in range(2):
        assert arrays(tmp_path / f"there-{index}") == arrays(tmp_path / f"here-{index}")


def test_a_candidate_that_fails_there_leaves_the_others(there, make_program, make_module):
    good, broken, module = make_program("a"), make_program("b"), make_module("c")
    other = make_program("d", factor=5.0)
    (broken / "model.onnx").write_bytes(b"\x08\x09")
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"bytes": 2, "sha256": client.sha256(broken / "model.onnx")}
    (broken / "manifest.json").write_text(json.dumps(manifest))
    timings = time_artifacts([good, broken, module, other], there, TINY, 0)
    assert [type(one) for one in timings] == [Timing, ArtifactError, SetupError, Timing]
    assert f"(on {there.target.address})" in timings[1].what or "cannot open" in timings[1].what
    assert "torch" in timings[2].why
    assert timings[3].reopened == (0.0,)


def test_a_module_stays_here(there, make_module, make_program):
    with pytest.raises(SetupError, match="cannot be measured on a target"):
        time_artifacts([make_module("a"), make_program("b")], there, TINY, 0)


def test_a_failure_of_what_is_measured_beside_belongs_to_its_artifact(there, make_program):
    def on_first(index, process):
        if index:
            raise ArtifactError("its outputs are NaN")

    timings = time_artifacts([make_program("a"), make_program("b")], there, TINY, 0, on_first=on_first)
    assert isinstance(timings[0], Timing)
    assert isinstance(timings[1], ArtifactError)


def test_a_process_there_opens_another_artifact_and_answers(there, make_program, tmp_path):
    inputs = samples(tmp_path / "inputs", 1)
    with there.start(make_program("a"), there.batches) as process:
        process.begin_open()
        assert process.end_open()["differences"] == [0.0]
        assert process.ask("memory")["peak_bytes"] > 0
        assert process.ask("kernels", batch=LATENCY)["kernels"]
        process.open_another(make_program("b", factor=-1.0))
        process.run_samples(inputs, tmp_path / "outputs")
    x = np.load(inputs / "0.npz")["x"]
    np.testing.assert_array_equal(np.load(tmp_path / "outputs" / "0.npz")["0"], -x)


def test_a_content_goes_over_once(server, connect, make_program, monkeypatch):
    sent = []
    request = Connection.request

    def counted(self, do, payload=None, **arguments):
        if do == "put":
            sent.append(arguments["digest"])
        return request(self, do, payload, **arguments)

    monkeypatch.setattr(Connection, "request", counted)
    artifact = make_program("once", factor=7.25)
    connect(server).send_artifact(artifact)
    assert len(sent) == 3  # program, recorded outputs, manifest
    connect(server).send_artifact(artifact)
    assert len(sent) == 3


def test_a_lost_connection_is_made_again_and_its_launch_done_again(there, server, make_program, tmp_path):
    cut = []
    inputs = samples(tmp_path / "inputs")

    def on_first(index, process):
        if not cut:
            cut.append(there.target.connection._process.pid)
            os.kill(cut[0], signal.SIGKILL)
        process.run_samples(inputs, tmp_path / f"out-{index}")

    timings = time_artifacts([make_program("a"), make_program("b")], there, TWO, 0, on_first=on_first)
    assert [one.launches for one in timings] == [2, 2]
    assert there.target.generation == 2
    assert len(arrays(tmp_path / "out-1")) == 2
    assert not list(server.cache.rglob("*partial*"))
    assert len(list((server.cache / "sessions").iterdir())) == 1


def test_a_process_that_a_lost_connection_ended_is_started_again(there, server, make_program, tmp_path):
    inputs = samples(tmp_path / "inputs")
    with there.start(make_program("a", factor=3.0), there.batches) as process:
        process.begin_open()
        process.end_open()
        server.kill_processes()
        process.run_samples(inputs, tmp_path / "outputs")
    assert len(arrays(tmp_path / "outputs")) == 2


def test_a_connection_that_does_not_come_back_ends_the_timing_and_keeps_its_launches(
    own_server, connect, bench, make_program, tmp_path
):
    there = replace(bench, target=connect(own_server, reconnect_s=0.5))

    def progress(done):
        own_server.env.write_text("exit 1\n")
        own_server.kill_processes()

    with pytest.raises(TargetGone):
        time_artifacts([make_program("a"), make_program("b")], there, PLANS["standard"], 0, progress)
    [kept] = (tmp_path / "measured.jsonl").read_text().splitlines()
    assert json.loads(kept)["artifacts"] == ["a", "b"]
    assert json.loads(kept)["launch"][1]["p50"] > 0


def test_one_run_at_a_time_measures_there(server, connect):
    first, second = connect(server, "run-1"), connect(server, "run-2")
    waited, entered = threading.Event(), threading.Event()
    said = []
    second._report = lambda text: (said.append(text), waited.set())

    def measure():
        with second.measuring():
            entered.set()

    thread = threading.Thread(target=measure)
    with first.measuring(), first.measuring():
        thread.start()
        assert waited.wait(20)
        assert not entered.is_set()
    assert entered.wait(20)
    thread.join()
    assert said[0].startswith(f"waiting for {server.url}: run-1 has been measuring on it for")


def test_the_lock_of_a_run_that_is_gone_is_free(server, connect):
    first = connect(server, "run-1")
    with first.measuring():
        os.kill(first.connection._process.pid, signal.SIGKILL)
        assert server.gone()
        with connect(server, "run-2").measuring():
            pass


def test_the_load_there_is_a_fraction(server, connect):
    target = connect(server)
    assert 0 <= target.other_load() <= 1
    assert 0 <= target.meter().load() <= 1
