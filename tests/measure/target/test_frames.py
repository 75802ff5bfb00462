"""Frames: what is written is read; a cut stream ends; what cannot be stored does not spoil the next frame."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from omgoptim.measure.target.frames import read_frame, write_frame


@pytest.fixture
def written(tmp_path):
    """A frame with a payload, and one without."""
    payload, stream = tmp_path / "payload", io.BytesIO()
    payload.write_bytes(b"\n{}\0" * 1000)
    write_frame(stream, {"do": "put", "digest": "d"}, payload)
    write_frame(stream, {"do": "next"})
    return stream.getvalue(), payload.read_bytes()


def test_frames_are_read_as_they_were_written(written, tmp_path):
    stream = io.BytesIO(written[0])
    frame = read_frame(stream, tmp_path / "scratch")
    assert frame == {"do": "put", "digest": "d", "payload": str(tmp_path / "scratch")}
    assert (tmp_path / "scratch").read_bytes() == written[1]
    assert read_frame(stream, tmp_path / "scratch") == {"do": "next"}
    assert read_frame(stream, tmp_path / "scratch") is None


@pytest.mark.parametrize("length", [0, 5, 40, 60, 3000])
def test_a_cut_frame_is_the_end(written, tmp_path, length):
    assert read_frame(io.BytesIO(written[0][:length]), tmp_path / "scratch") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_payload_that_cannot_be_stored_is_said_and_the_next_frame_read(written):
    stream = io.BytesIO(written[0])
    frame = read_frame(stream, Path("/dev/full"))
    assert frame["payload"] is None
    assert "No space left" in frame["failure"]
    assert read_frame(stream, Path("/dev/full")) == {"do": "next"}


def test_what_is_no_object_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a JSON object"):
        read_frame(io.BytesIO(b"[1]\n"), tmp_path / "scratch")
