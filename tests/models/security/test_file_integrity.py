"""The key of a user, and what is signed with it."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from omgoptim.models.security import file_integrity as origin

RECORD = {"runtime": "onnxruntime", "files": {"b": 1, "a": [1.5, None, "é"]}}


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMGOPTIM_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_signed_record_is_this_users_until_one_value_of_it_changes(state: Path) -> None:
    signed = json.loads(json.dumps(origin.sign_record("artifact", RECORD)))
    assert {name: value for name, value in signed.items() if name != "origin"} == RECORD
    assert origin.is_signed("artifact", dict(reversed(signed.items())))
    assert not origin.is_signed("artifact", signed | {"runtime": "openvino"})
    assert not origin.is_signed("artifact", signed | {"more": None})
    assert not origin.is_signed("request", signed)
    assert not origin.is_signed("artifact", RECORD)
    (state / "key").write_text("00" * 32)
    assert not origin.is_signed("artifact", signed)


def test_the_key_is_made_once_and_only_its_user_reads_it(state: Path) -> None:
    assert not origin.is_signed("artifact", RECORD | {"origin": "00"})
    assert not state.exists()  # reading makes no key
    assert origin.can_sign()
    key = (state / "key").read_text()
    assert len(bytes.fromhex(key)) == 32
    assert stat.S_IMODE((state / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    origin.sign_record("artifact", RECORD)
    assert (state / "key").read_text() == key
    assert [path.name for path in state.iterdir()] == ["key"]


def _seal(_: int) -> str:
    return str(origin.sign_record("artifact", RECORD)["origin"])


def test_processes_that_begin_at_once_share_one_key(state: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert len(set(pool.map(_seal, range(8), chunksize=1))) == 1
    assert [path.name for path in state.iterdir()] == ["key"]


@pytest.mark.parametrize("text", ["", "00", "zz" * 32, "\u00e9" * 64])
def test_a_file_that_holds_no_key_seals_nothing(state: Path, text: str) -> None:
    state.mkdir()
    (state / "key").write_text(text)
    assert not origin.can_sign()
    assert origin.sign_record("artifact", RECORD) == RECORD


def test_where_no_key_can_be_kept_nothing_is_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OMGOPTIM_STATE_DIR", str(tmp_path / "file" / "state"))
    assert not origin.can_sign()
    assert origin.sign_record("artifact", RECORD | {"origin": "old"}) == RECORD


def test_the_state_folder_is_the_users_and_never_one_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMGOPTIM_STATE_DIR", "relative")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert origin.state_folder() == Path("/xdg/omgoptim")
    monkeypatch.delenv("XDG_STATE_HOME")
    if os.name == "posix":
        monkeypatch.setenv("HOME", "/home/me")
        assert origin.state_folder() == Path("/home/me/.local/state/omgoptim")
