"""The processes that evaluate candidate after candidate: one per engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from float_programs import gemm, program

from omgoptim.errors import ArtifactError
from omgoptim.measure import measuring_process
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.measure.quality import read_outputs
from omgoptim.models import artifact as artifacts
from omgoptim.models.manifest import PROGRAM, Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.operations.quantization.candidate_evaluator import Evaluators
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import InputTensor, Signature

SIGNATURE = Signature((InputTensor("x", "float32", ("batch", 3), False),), None)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three artifacts that multiply by 1, 2 and 3."""
    found = []
    for factor in (1, 2, 3):
        path = tmp_path / f"{factor}.onnx"
        onnx.save(program([gemm("x", "w", "", "y")], {"w": factor * np.eye(3)}, ["batch", 3], ["batch", 3]), path)
        example = {"x": np.ones((2, 3), np.float32)}
        outputs = ENGINES["onnxruntime"].open(path, SIGNATURE, SessionSettings(1)).run(example)
        folder = tmp_path / f"times-{factor}"
        artifacts.save_program(
            folder, path, Manifest("onnxruntime", "float32", SIGNATURE), OutputCheck(example, outputs)
        )
        found.append(folder)
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The first artifact of each process that was started."""
    first: list[Path] = []

    class Noted(MeasuringProcess):
        def __init__(self, artifact: Path, *setup: Any) -> None:
            first.append(artifact)
            super().__init__(artifact, *setup)

    monkeypatch.setattr(measuring_process, "MeasuringProcess", Noted)
    return first


def test_one_process_evaluates_all_candidates_of_an_engine_and_a_broken_one_harms_no_other(
    folders: list[Path], started: list[Path], tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    np.savez(inputs / "0.npz", x=np.arange(6, dtype=np.float32).reshape(2, 3))
    with Evaluators(TimingSetup({}, 1, 1, tmp_path)) as evaluators:
        evaluators.begin(folders[0], "onnxruntime")
        for factor, folder in enumerate(folders, start=1):
            target = tmp_path / f"outputs-{factor}"
            evaluators.run(folder, "onnxruntime", inputs, target)
            (given,) = read_outputs(target)[0]
            assert np.array_equal(given, factor * np.arange(6).reshape(2, 3))
        assert started == [folders[0]]
        (folders[1] / PROGRAM).write_bytes(b"damaged")
        with pytest.raises(ArtifactError, match="damaged"):
            evaluators.run(folders[1], "onnxruntime", inputs, tmp_path / "none")
        assert started == [folders[0], folders[1]]  # tried once more, in a fresh process
        evaluators.run(folders[2], "onnxruntime", inputs, tmp_path / "again")
        assert np.array_equal(read_outputs(tmp_path / "again")[0][0], given)
