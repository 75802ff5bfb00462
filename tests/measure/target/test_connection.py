"""Failures of a target, each with its own error within seconds, and the ssh command line."""

from __future__ import annotations

import socket
import venv

import pytest
from ssh_server import Server, write_config, write_script

from omgoptim.errors import SetupError
from omgoptim.measure.target import connection
from omgoptim.measure.target.connection import Connection, ssh_command
from omgoptim.measure.target.machine import describe_machine, prepare_machine
from omgoptim.requests.base import TargetAddress


def refusal(server: Server) -> SetupError:
    with pytest.raises(SetupError) as raised:
        Connection(TargetAddress.parse(server.url)).close()
    return raised.value


def hide_other_pythons(server: Server) -> None:
    """Leave the target a PATH with nothing but what lies in its first folder."""
    (server.bin / "sh").symlink_to("/bin/sh")
    (server.bin / "uname").symlink_to("/usr/bin/uname")
    server.env.write_text(f"PATH={server.bin}\n")


def use_bare_python(server: Server) -> None:
    """Give the target a Python without any package, pip among them."""
    place = server.folder / "bare"
    venv.create(place, with_pip=False)
    server.use_python(str(place / "bin" / "python3"))


def test_ssh_asks_nothing_forwards_nothing_and_takes_no_option_from_the_address(monkeypatch):
    monkeypatch.delenv(connection.CONFIG_VARIABLE, raising=False)
    command = ssh_command(TargetAddress.parse("ssh://pi@board:2222"), "true")
    assert command[:4] == ["ssh", "-T", "-a", "-x"]
    assert command[-5:] == ["-p", "2222", "--", "pi@board", "true"]
    assert {"BatchMode=yes", "ClearAllForwardings=yes"} <= set(command)
    assert not any("StrictHostKeyChecking" in part or "UserKnownHosts" in part for part in command)


def test_a_closed_port_is_unreachable():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = TargetAddress("127.0.0.1", None, unused.getsockname()[1])
        with pytest.raises(SetupError, match="cannot be reached") as raised:
            Connection(address)
    assert "refused" in raised.value.why
    assert f"-p {address.port} -- 127.0.0.1 true" in raised.value.fix


def test_a_host_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(connection, "HELLO_LIMIT_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(SetupError, match="cannot be reached") as raised:
            Connection(TargetAddress("127.0.0.1", None, silent.getsockname()[1]))
    assert "did not answer within 0.5 s" in raised.value.why


def test_no_ssh_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="ssh cannot be started"):
        Connection(TargetAddress("127.0.0.1"))


def test_a_wrong_key_is_refused_without_a_question(own_server):
    write_config(own_server, key="other_key")
    error = refusal(own_server)
    assert "cannot be reached" in error.what
    assert "Permission denied" in error.why


def test_an_unknown_host_key_is_refused_and_not_stored(own_server):
    write_config(own_server, known="empty")
    assert "Host key verification failed" in refusal(own_server).why
    assert not (own_server.folder / "empty").exists()


def test_a_target_without_python(own_server):
    hide_other_pythons(own_server)
    (own_server.bin / "python3").unlink()
    error = refusal(own_server)
    assert error.what == f"{own_server.url} has no Python 3.10 or newer"
    assert "no Python is on the PATH" in error.why


def test_a_target_with_an_old_python(own_server):
    hide_other_pythons(own_server)
    write_script(own_server.bin / "python3", 'case "$2" in *"sys.exit"*) exit 1 ;; *) echo 3.8.10 ;; esac')
    error = refusal(own_server)
    assert error.what == f"{own_server.url} has no Python 3.10 or newer"
    assert "python3 3.8.10, which is too old" in error.why


def test_a_newer_python_under_another_name_is_found(own_server):
    hide_other_pythons(own_server)
    own_server.use_python()
    (own_server.bin / "python3").rename(own_server.bin / "python3.11")
    write_script(own_server.bin / "python3", 'case "$2" in *"sys.exit"*) exit 1 ;; *) echo 3.8.10 ;; esac')
    Connection(TargetAddress.parse(own_server.url)).close()


def test_a_target_without_space(own_server):
    stub = "import collections, shutil\nshutil.disk_usage = lambda path: collections.namedtuple('U', 'free')(2**20)\n"
    (own_server.folder / "sitecustomize.py").write_text(stub)
    own_server.env.write_text(f"export PYTHONPATH={own_server.folder}\n")
    error = refusal(own_server)
    assert error.what == f"{own_server.url} has no free disk space"
    assert "1 MiB are free" in error.why


def test_a_home_folder_that_cannot_be_written(own_server):
    (own_server.home / ".cache").write_text("a file")
    assert refusal(own_server).what == f"{own_server.url} has no free disk space"


def test_another_architecture_without_packages(own_server):
    """Nothing can be copied to it, and it reaches no index."""
    hide_other_pythons(own_server)
    (own_server.bin / "uname").unlink()
    write_script(own_server.bin / "uname", "echo Linux riscv64")
    use_bare_python(own_server)
    opened = Connection(TargetAddress.parse(own_server.url))
    try:
        with pytest.raises(SetupError, match="lacks numpy and onnxruntime") as raised:
            prepare_machine(opened, "onnxruntime")
        assert describe_machine(opened).versions == {}
    finally:
        opened.close()
    assert raised.value.why.startswith("Linux riscv64, Python ")
    assert "the target is Linux riscv64" in raised.value.why
    assert "-m pip install numpy onnxruntime" in raised.value.fix


def test_a_login_shell_that_prints_is_no_hindrance(own_server):
    own_server.env.write_text('echo Welcome\necho \'{"not": "ours"}\'\n')
    Connection(TargetAddress.parse(own_server.url)).close()
    assert own_server.gone()


@pytest.mark.slow
def test_a_target_without_a_network_gets_the_packages_of_this_python(own_server):
    use_bare_python(own_server)
    for _ in range(2):
        opened = Connection(TargetAddress.parse(own_server.url))
        machine, notes = prepare_machine(opened, "onnxruntime")
        opened.close()
        assert {"numpy", "onnxruntime"} <= set(machine.versions)
        assert notes == []
