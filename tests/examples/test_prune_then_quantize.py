from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.slow
def test_both_steps_shrink_the_model_and_the_second_goes_on_from_the_first(
    example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("digits_cnn.py", "digits_cnn.safetensors"):
        shutil.copy(Path(example.__file__).with_name(name), tmp_path)
    monkeypatch.setattr(example, "HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pruned, quantized = example.main("quick")
    assert pruned.after.params < 0.3 * pruned.before.params
    assert quantized.before.params == pruned.after.params
    assert pruned.after.size_bytes < pruned.before.size_bytes
    sizes = [candidate.size_bytes for candidate in quantized.candidates if candidate.size_bytes]
    assert min(sizes) < 0.5 * pruned.after.size_bytes  # which of them is the fastest is the machine's to say
    assert quantized.lineage == [pruned.run_id, quantized.run_id]


def test_the_file_is_shorter_than_60_lines(example):
    assert len(Path(example.__file__).read_text().splitlines()) < 60
