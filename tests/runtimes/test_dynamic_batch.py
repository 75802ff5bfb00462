"""Forwards that make the batch a Python number: exported with a dynamic batch if possible, else reported by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_onnx, export_pt2
from omgoptim.runtimes.signature import InputTensor, Signature

SIGNATURE = Signature((InputTensor("x", "float32", ("batch", 3), False),), "tensor")
EXAMPLE = {"x": torch.arange(6.0).reshape(2, 3)}


class Token(nn.Module):
    """Repeats a token for every sample, by `len`."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.tensor([[7.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1), x], 1)


class Looped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[index] * 2 for index in range(x.shape[0])])


@pytest.mark.parametrize("size", [1, 5])
def test_len_of_the_batch_leaves_it_free(tmp_path: Path, size: int) -> None:
    module, rows = Token().eval(), np.ones((size, 3), np.float32)
    export_onnx(module, EXAMPLE, SIGNATURE, tmp_path / "model.onnx")
    session = ENGINES["onnxruntime"].open(tmp_path / "model.onnx", SIGNATURE, SessionSettings(threads=1))
    assert np.array_equal(session.run({"x": rows})[0], module(torch.from_numpy(rows)).detach().numpy())
    assert "len" not in globals()


def test_len_of_the_batch_leaves_that_of_a_pt2_free_too(tmp_path: Path) -> None:
    export_pt2(Token().eval(), EXAMPLE, SIGNATURE, tmp_path / "model.pt2")
    assert torch.export.load(tmp_path / "model.pt2").module()(torch.ones(5, 3)).shape == (5, 4)


def test_a_fixed_batch_is_an_error_with_the_line_that_fixes_it(tmp_path: Path) -> None:
    with pytest.raises(TechniqueError, match="fixed batch size") as error:
        export_onnx(Looped().eval(), EXAMPLE, SIGNATURE, tmp_path / "model.onnx")
    assert "test_dynamic_batch.py, line" in error.value.why
    assert "range(x.shape[0])" in error.value.why
    assert "x.shape[0]" in error.value.fix
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(("export", "name"), [(export_onnx, "model.onnx"), (export_pt2, "model.pt2")])
def test_a_fixed_batch_may_be_exported_at_one_and_the_line_is_reported(export: Any, name: str, tmp_path: Path) -> None:
    reason = export(Looped().eval(), EXAMPLE, SIGNATURE, tmp_path / name, or_at_one=True)
    assert "test_dynamic_batch.py, line" in reason
    assert "range(x.shape[0])" in reason
    rows = np.array([[1, 2, 3]], np.float32)
    if export is export_onnx:
        given = ENGINES["onnxruntime"].open(tmp_path / name, SIGNATURE.at_batch(1), SessionSettings(threads=1))
        assert np.array_equal(given.run({"x": rows})[0], rows * 2)
    else:
        assert torch.equal(
            torch.export.load(tmp_path / name).module()(torch.from_numpy(rows)), torch.from_numpy(rows * 2)
        )
    assert export(Token().eval(), EXAMPLE, SIGNATURE, tmp_path / name, or_at_one=True) is None
