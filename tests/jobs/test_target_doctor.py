"""doctor of a target, with a real SSH server on the loopback interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh_server import Server, running_server

from omgoptim.errors import SetupError
from omgoptim.hardware import cpu_name, usable_cores
from omgoptim.jobs.doctor import doctor
from omgoptim.measure.target.connection import CONFIG_VARIABLE
from omgoptim.render.markdown import doctor_markdown
from omgoptim.requests import DoctorRequest


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("sshd")) as server:
        monkeypatch.setenv(CONFIG_VARIABLE, str(server.config))
        yield server


def test_it_says_what_is_there_and_clean_empties_the_cache(server: Server, project: Path) -> None:
    report = doctor(DoctorRequest(project=str(project), target=server.url))
    assert report.outcome == "ok"
    assert (report.target, report.cpu, report.cores) == (server.url, cpu_name(), usable_cores())
    assert report.memory_bytes
    assert {one.name for one in report.runtimes if one.state == "ok"} >= {"onnxruntime"}
    assert server.url in doctor_markdown(report)
    assert list(server.cache.iterdir())
    cleaned = doctor(DoctorRequest(project=str(project), target=server.url, clean=True))
    assert f"from {server.cache}" in cleaned.summary
    assert not server.cache.exists()
    assert server.gone()


def test_it_says_what_is_missing_and_changes_nothing(server: Server, project: Path) -> None:
    import venv

    venv.create(server.folder / "bare", with_pip=False)
    server.use_python(str(server.folder / "bare" / "bin" / "python3"))
    report = doctor(DoctorRequest(project=str(project), target=server.url))
    assert report.outcome == "incomplete"
    assert "lacks numpy and onnxruntime" in report.summary
    assert all("-m pip install" in (one.fix or "") for one in report.runtimes)
    assert not list((server.cache / "packages").iterdir())


def test_a_target_that_cannot_be_reached_is_an_error(server: Server, project: Path) -> None:
    server.env.write_text("exit 1\n")
    with pytest.raises(SetupError, match="cannot be reached"):
        doctor(DoctorRequest(project=str(project), target=server.url))
