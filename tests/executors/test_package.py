"""The zip of a project: what is in it, and what stays here."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from omgoptim.errors import RequestError
from omgoptim.executors import connection
from omgoptim.executors.connection import pack


def test_a_package_has_the_projects_files_without_environments_runs_and_links_out(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("net.py", "data/train.npz", ".venv/lib.py", ".omgoptim/runs/a/log.txt", "big/raw.bin", "big/keep.txt"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (tmp_path / "secret").write_text("key")
    (project / "link").symlink_to(tmp_path / "secret")
    (project / ".rayignore").write_text("# data\n*.bin\n")
    packed = pack(project, tmp_path / "project.zip")
    with zipfile.ZipFile(packed.file) as archive:
        assert sorted(archive.namelist()) == [".rayignore", "big/keep.txt", "data/train.npz", "net.py"]
    assert (packed.files, packed.size_bytes) == (4, packed.file.stat().st_size)


def test_a_project_that_ray_does_not_take_is_refused_with_its_largest_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_BYTES", 1000)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train.bin").write_bytes(bytes(2000))
    with pytest.raises(RequestError, match="too large to be sent") as refused:
        pack(tmp_path, tmp_path / "project.zip")
    assert "images" in refused.value.why
    assert not (tmp_path / "project.zip").exists()
