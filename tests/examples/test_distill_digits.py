from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.slow
def test_a_student_is_taught_and_then_quantized(example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digits_cnn.py", "digits_cnn.safetensors", "distill_digits.py"):
        shutil.copy(Path(example.__file__).with_name(name), tmp_path)
    monkeypatch.setattr(example, "HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    distilled, quantized = example.main(6, "quick")
    assert distilled.before.params > 50 * distilled.after.params
    assert distilled.after.quality > 0.8
    assert distilled.control is not None
    assert quantized.after.size_bytes < distilled.after.size_bytes
    assert quantized.lineage == [distilled.run_id, quantized.run_id]


def test_the_file_is_shorter_than_60_lines(example) -> None:
    assert len(Path(example.__file__).read_text().splitlines()) < 60
