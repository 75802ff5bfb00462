"""Tasks on a local Ray and on a cluster: lost workers and nodes, dead addresses, and no leftovers."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from omgoptim.errors import RequestError, RunError, SetupError
from omgoptim.executors import Task
from omgoptim.executors.connection import cluster_address, probe_head
from omgoptim.executors.ray import RayExecutor

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home folder, which must stay empty; no process of Ray may be left at the end."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    _, left = psutil.wait_procs(rays(), timeout=20)
    assert left == []
    assert list(folder.rglob("*")) == []


def rays() -> list[psutil.Process]:
    """The processes that a Ray of this test started: they have its home folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            line = " ".join(process.cmdline())
            own = process.environ().get("HOME") == os.environ["HOME"] and process.pid != os.getpid()
            if own and any(name in line for name in ("/ray/", "ray::")):
                found.append(process)
    return found


def task(folder: Path, name: str, number: int, **more: Any) -> Task:
    payload = {"number": number, "log": str(folder / "log")} | more
    return Task(f"sample_tasks:{name}", payload, folder / f"{number:03d}")


def starts(folder: Path) -> list[tuple[int, int]]:
    """Number and process of each start so far."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(number), int(pid)) for number, pid in map(str.split, lines)]


def quiet(_stage: str, _done: float | None) -> None:
    return None


def test_a_killed_worker_of_ray_loses_no_task_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    executor = RayExecutor(2, tmp_path, quiet)
    futures = [executor.submit(task(tmp_path, "waiting", number, until=str(tmp_path / "go"))) for number in range(4)]
    while len(starts(tmp_path)) < 2:
        assert not any(future.done() for future in futures)
    number, pid = starts(tmp_path)[0]
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "go").touch()
    results = [future.result(120) for future in futures]
    with pytest.raises(RunError, match="was lost 3 times"):
        executor.submit(task(tmp_path, "dying", 8)).result(120)
    executor.close()
    assert [result.attempt for result in results] == [2 if at == number else 1 for at in range(4)]
    assert sorted(at for at, _ in starts(tmp_path)) == sorted([*range(4), number, 8, 8, 8])
    assert [(tmp_path / f"{at:03d}" / "square").read_text() for at in range(4)] == ["0", "1", "4", "9"]
    assert not list(tmp_path.glob(".shared-*"))


def test_an_address_where_nothing_answers_is_an_error_and_so_is_the_ray_client(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(SetupError, match="no Ray head answers"):
        cluster_address()
    with pytest.raises(SetupError, match="no Ray head answers"):
        probe_head(f"http://127.0.0.1:{port}")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(RequestError, match="does not use the Ray Client") as refused:
        cluster_address()
    assert "http://head:8265" in refused.value.fix
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster_address() is None


STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1])
except Exception as error:
    print(error)
"""


def without_token() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}


@pytest.mark.slow
def test_a_process_can_start_one_ray_after_another_and_each_knows_only_its_own(home: Path, tmp_path: Path) -> None:
    for number in range(2):
        executor = RayExecutor(1, tmp_path, quiet)
        assert executor.submit(task(tmp_path, "square", number)).result(120).attempt == 1
        address = ray.get_runtime_context().gcs_address
        stranger = subprocess.run([sys.executable, "-c", STRANGER, address], env=without_token(), capture_output=True)
        assert b"InvalidAuthToken" in stranger.stdout
        executor.close()
        assert without_token() == os.environ


@pytest.mark.slow
def test_a_removed_node_loses_no_task(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT}")
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    other = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    address = cluster.address
    monkeypatch.setenv("RAY_ADDRESS", address)
    project = tmp_path / "project"
    project.mkdir()
    (project / "net.py").write_text("width = 8\n")
    said: list[str] = []
    executor = RayExecutor(2, project, lambda stage, _done: said.append(stage))
    try:
        futures = [
            executor.submit(task(tmp_path, "waiting", number, until=str(tmp_path / "go"))) for number in range(4)
        ]
        while len(starts(tmp_path)) < 2:
            assert not any(future.done() for future in futures)
        cluster.remove_node(other, allow_graceful=False)
        (tmp_path / "go").touch()
        results = [future.result(180) for future in futures]
    finally:
        executor.close()
        cluster.shutdown()
    assert sorted(result.attempt for result in results) == [1, 1, 1, 2]
    assert len(starts(tmp_path)) == 5
    assert said[0].startswith(f"sending the project to {address}: 0.0 MB in 1 files")


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_ray import task, quiet
from omgoptim.executors.ray import RayExecutor

folder = Path({folder!r})
executor = RayExecutor(2, folder, quiet)
numbers = [number for number in range(4) if not (folder / f"{{number:03d}}").is_dir()]
print(numbers, flush=True)
for future in [executor.submit(task(folder, "waiting", n, until={first!r} if n < 2 else {go!r})) for n in numbers]:
    future.result()
executor.close()
"""


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_and_its_finished_tasks_are_not_repeated(home: Path, tmp_path: Path) -> None:
    first, go = tmp_path / "first", tmp_path / "go"
    code = DRIVER.format(tests=str(Path(__file__).parent), folder=str(tmp_path), first=str(first), go=str(go))
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    first.touch()
    while len(starts(tmp_path)) < 4:
        assert driver.poll() is None
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(rays(), timeout=30)
    assert left == []
    assert sorted(path.name for path in tmp_path.glob("0*") if path.name.isdecimal()) == ["000", "001"]
    go.touch()
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert again.stdout.splitlines()[0] == "[2, 3]"
    assert sorted(number for number, _ in starts(tmp_path)) == [0, 1, 2, 2, 3, 3]
    assert all((tmp_path / f"{number:03d}" / "square").exists() for number in range(4))
