"""Measuring processes and how they end, with real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from omgoptim.bootstrap import PACKAGE_FILE
from omgoptim.errors import ArtifactError, ModelError, UserCodeError
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup

MIB = 1 << 20


@pytest.fixture
def start(batches, tmp_path):
    """`start(artifact)`: a process that has opened it. All are ended after the test."""
    started = []

    def opened(artifact, limit_s=60.0, **options):
        process = MeasuringProcess(artifact, TimingSetup(batches, 1, 1, tmp_path, **options), limit_s=limit_s)
        started.append(process.__enter__())
        process.begin_open()
        process.end_open()
        return process

    yield opened
    for process in started:
        process.__exit__(None, None, None)


def test_it_opens_the_artifact_in_a_process_of_its_own_and_is_gone_afterwards(make_module, batches, tmp_path, is_alive):
    artifact = make_module("artifact", name="a")
    with MeasuringProcess(artifact, TimingSetup(batches, 1, 1, tmp_path)) as process:
        process.begin_open()
        assert process.end_open()["differences"] == [0]
        pid, parent = json.loads((tmp_path / "calls.jsonl").read_text().splitlines()[0])[1:3]
        assert pid != os.getpid() == parent
        assert is_alive(pid)
    assert not is_alive(pid)


def test_it_is_gone_after_an_error_in_the_caller_even_if_it_hangs(make_module, batches, tmp_path, is_alive):
    artifact = make_module("artifact", does="hang")
    process = MeasuringProcess(artifact, TimingSetup(batches, 1, 1, tmp_path)).__enter__()
    process.begin_open()
    process.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not is_alive(process._process.pid)


def test_a_damaged_artifact_is_refused_as_what_it_is(make_program, start):
    artifact = make_program("artifact")
    program = artifact / "model.onnx"
    program.write_bytes(program.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactError, match="is damaged") as raised:
        start(artifact)
    assert "model.onnx" in raised.value.why


def test_an_artifact_that_no_longer_gives_what_it_gave_is_refused(make_module, start, tmp_path):
    artifact = make_module("artifact")
    code = tmp_path / "modules_of_user.py"
    code.write_text(code.read_text().replace("x * self.weight", "x * self.weight * 1.01"))
    with pytest.raises(ArtifactError, match="does not reproduce its recorded outputs"):
        start(artifact)


def test_a_killed_process_is_an_error_that_names_the_signal(make_module, start):
    with pytest.raises(ArtifactError, match="died during 'open'") as raised:
        start(make_module("artifact", does="die"))
    assert "SIGKILL" in raised.value.why
    assert "memory" in raised.value.why


def test_a_process_killed_between_two_commands_is_an_error_at_the_next(make_program, start):
    process = start(make_program("artifact"))
    os.kill(process._process.pid, signal.SIGTERM)
    process._process.wait()
    with pytest.raises(ArtifactError, match="died during 'memory'") as raised:
        process.ask("memory")
    assert "SIGTERM" in raised.value.why


def test_a_process_that_exits_is_an_error_that_names_its_code(make_module, start):
    with pytest.raises(ArtifactError) as raised:
        start(make_module("artifact", does="exit"))
    assert "exit code 7" in raised.value.why


def test_a_process_that_does_not_answer_in_time_is_ended(make_program, batches, tmp_path, is_alive):
    """Stopped, it can answer nothing, however long it is waited for."""
    with MeasuringProcess(make_program("artifact"), TimingSetup(batches, 1, 1, tmp_path), limit_s=0.2) as process:
        pid = process._process.pid
        os.kill(pid, signal.SIGSTOP)
        process.begin_open()
        with pytest.raises(ArtifactError, match=r"did not answer 'open' within 0\.2 s"):
            process.end_open()
    assert not is_alive(pid)


def test_a_modules_own_error_is_reported_by_its_first_line(make_module, start):
    with pytest.raises(ArtifactError, match="the engine failed on the artifact") as raised:
        start(make_module("artifact", does="fail"))
    assert raised.value.why == "ValueError: no kernel for this"


def test_user_code_that_cannot_be_imported_is_the_users_error(make_module, start, tmp_path):
    artifact = make_module("artifact")
    (tmp_path / "modules_of_user.py").write_text("1 / 0")
    with pytest.raises(UserCodeError) as raised:
        start(artifact)
    assert "ZeroDivisionError" in raised.value.why


def test_user_code_may_print_a_lot_and_read_standard_input(make_module, start, capfd):
    process = start(make_module("prints", does="print"))
    assert process.ask("warm", batch="latency")["call_s"] > 0
    assert "y" * 1000 in capfd.readouterr().err
    assert start(make_module("reads", does="read")).ask("warm", batch="latency")["call_s"] > 0


def test_a_child_that_user_code_leaves_behind_does_not_hold_up_the_end(make_module, batches, tmp_path):
    """It holds the other end of the pipe. The check batch is the only call here, so that one child is left."""
    artifact = make_module("artifact", does="leave_a_child")
    with MeasuringProcess(artifact, TimingSetup(batches, 1, 1, tmp_path)) as process:
        process.begin_open()
        process.end_open()
        children = Path(f"/proc/{process._process.pid}/task/{process._process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert len(children) == 1


def test_nan_in_an_output_is_an_error_with_its_position(make_module, start, batches, tmp_path):
    process = start(make_module("artifact", does="nan"))
    fractions: list[float] = []
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "000000.npz").write_bytes(batches["latency"].read_bytes())
    (inputs / "000001.npz").write_bytes(batches["throughput"].read_bytes())
    with pytest.raises(
        ModelError, match="the model's outputs contain NaN on the evaluation data with torch_eager"
    ) as raised:
        process.run_samples(inputs, tmp_path / "outputs", fractions.append)
    assert raised.value.why == "output 0 of batch 000001, row 0: 12 of 12 values are NaN"


def test_outputs_are_written_batch_by_batch(make_program, start, batches, tmp_path):
    process = start(make_program("artifact", factor=3.0))
    fractions: list[float] = []
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "000000.npz").write_bytes(batches["throughput"].read_bytes())
    (inputs / "000001.npz").write_bytes(batches["throughput"].read_bytes())
    process.run_samples(inputs, tmp_path / "outputs", fractions.append)
    with np.load(tmp_path / "outputs" / "000000.npz") as written, np.load(inputs / "000000.npz") as given:
        np.testing.assert_allclose(written["0"], given["x"] * 3, rtol=1e-6)
    assert fractions == [0.0, 0.5]


HOLD_AND_MEASURE = """
import sys
from pathlib import Path
held = b"x" * (500 * 1024 * 1024)
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
with MeasuringProcess(Path(sys.argv[1]), TimingSetup({}, 1, 1, Path(sys.argv[2]))) as process:
    process.begin_open()
    process.end_open()
    print(process.ask("memory")["peak_bytes"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads VmHWM")
def test_peak_memory_is_the_measuring_processs_own_and_not_its_parents(make_program, tmp_path):
    command = [sys.executable, "-c", HOLD_AND_MEASURE, str(make_program("artifact")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_FILE.parents[1])}
    peak = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert 20 * MIB < int(peak) < 300 * MIB
