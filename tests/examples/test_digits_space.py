from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from omgoptim.architecture_search.define_by_run import build, probe_space

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_the_space_is_a_product_of_as_many_networks_as_its_docstring_says(example) -> None:
    space = probe_space(example.space, seed=0).space
    assert space is not None
    assert f"{space.size:,} networks" in example.space.__doc__
    for row in (space.all_rows[0], space.all_rows[-1]):
        network = build(example.space, space.configuration(row)).eval()
        assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


@pytest.mark.slow
def test_a_network_is_found(example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digits_cnn.py", "digits_cnn.safetensors", "digits_space.py"):
        shutil.copy(Path(example.__file__).with_name(name), tmp_path)
    monkeypatch.setattr(example, "HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    report = example.main(3, 9, "quick", target_speedup=None, target_size_mb=0.2)
    assert report.after.size_bytes <= 200_000


def test_the_file_is_shorter_than_60_lines(example) -> None:
    assert len(Path(example.__file__).read_text().splitlines()) < 60
