"""The cache folder of a target."""

from __future__ import annotations

import hashlib
import os

import pytest

from omgoptim.errors import SetupError
from omgoptim.measure.target import store as stores
from omgoptim.measure.target.store import Store


@pytest.fixture
def open_store(tmp_path):
    """`open_store()`: a connection's store in one cache folder."""
    opened = []

    def make():
        (tmp_path / "cache").mkdir(exist_ok=True)
        opened.append(Store(tmp_path / "cache"))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def put(store, content, age_s=0):
    digest = hashlib.sha256(content).hexdigest()
    store.path(digest).write_bytes(content)
    os.utime(store.path(digest), (1e9 - age_s, 1e9 - age_s))
    return digest


def test_contents_above_the_bound_go_the_longest_unused_first(open_store, monkeypatch):
    store = open_store()
    old, newer, newest = (put(store, bytes([age]) * 100, age) for age in (30, 20, 10))
    assert store.has(old)  # which uses it
    store.close()
    monkeypatch.setattr(stores, "MAX_BYTES", 250)
    store = open_store()
    assert [store.has(digest) for digest in (old, newer, newest)] == [True, False, True]


def test_what_a_dead_connection_left_goes_and_what_a_living_one_has_stays(open_store):
    living, dead = open_store(), open_store()
    (living.session / "file").write_text("in use")
    (dead.session / "payload-0").write_text("half")
    dead._alive.close()
    open_store()
    assert (living.session / "file").exists()
    assert not dead.session.exists()


def test_an_artifact_is_a_folder_of_contents(open_store):
    store = open_store()
    folder = store.artifact("0", {"model.onnx": put(store, b"a program"), "sub/data.bin": put(store, b"weights")})
    assert (folder / "model.onnx").read_bytes() == b"a program"
    assert (folder / "sub" / "data.bin").read_bytes() == b"weights"
    store.close()
    assert not folder.exists()


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x"])
def test_an_artifacts_file_stays_in_its_folder(open_store, name):
    store = open_store()
    with pytest.raises(ValueError, match="not a path inside"):
        store.artifact("0", {name: put(store, b"x")})


@pytest.mark.parametrize("digest", ["", "../key", "A" * 64, "0" * 63])
def test_a_content_has_no_other_name_than_its_hash(open_store, digest):
    with pytest.raises(ValueError, match="sha256"):
        open_store().path(digest)


def test_cleaning_removes_everything_unless_a_run_measures(open_store, tmp_path):
    store, other = open_store(), open_store()
    put(store, b"x" * 1000)
    assert other.hold("run-1") is None
    with pytest.raises(SetupError, match="is in use") as raised:
        store.clean()
    assert "run-1 has been measuring on it" in raised.value.why
    other.release()
    assert store.clean() >= 1000
    assert not (tmp_path / "cache").exists()
