from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from omgoptim.errors import ModelError
from omgoptim.hardware import TRAINING_COPIES, refuse_beyond_memory, training_bytes, weight_bytes
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import load_source


def test_what_fits_is_let_through_to_the_byte_and_more_is_refused() -> None:
    refuse_beyond_memory(100, "loading it", available_bytes=100)
    with pytest.raises(ModelError, match="loading it does not fit into memory") as refused:
        refuse_beyond_memory(2_000_000_001, "loading it", available_bytes=2_000_000_000)
    assert "2.0 GB" in refused.value.why


def test_training_takes_a_weight_its_gradient_two_moments_and_the_best_so_far() -> None:
    assert training_bytes(nn.Linear(3, 2)) == TRAINING_COPIES * 4 * 8


def test_a_folder_counts_the_largest_of_its_formats(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1" * 10)
    (tmp_path / "b.safetensors").write_bytes(b"1" * 10)
    (tmp_path / "a.bin").write_bytes(b"1" * 15)
    (tmp_path / "notes.txt").write_bytes(b"1" * 99)
    assert weight_bytes(tmp_path) == 20
    assert weight_bytes(tmp_path / "a.bin") == 15


def test_weights_beyond_memory_are_refused_before_any_code_of_the_model_runs(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("raise SystemExit('was run')")
    with (tmp_path / "huge.pt").open("wb") as file:
        file.truncate(1 << 43)  # eight terabytes that take no disk
    with pytest.raises(ModelError, match="does not fit into memory"):
        load_source("net.py:build", PathPolicy.of(tmp_path, []), checkpoint="huge.pt")


def test_a_state_dict_of_ordinary_size_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 2)\n")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "net.pt")
    assert load_source("net.py:build", PathPolicy.of(tmp_path, []), checkpoint="net.pt").module is not None
