"""factorize as a whole run: low-rank factors, fine-tuned, saved, reopened and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import omgoptim
from omgoptim.blocks.low_rank import LowRankLinear
from omgoptim.errors import DataError, TechniqueError
from omgoptim.models.artifact import load_module
from omgoptim.models.manifest import Manifest
from omgoptim.models.security.path_policy import PathPolicy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

NET = """
import torch
from torch import nn
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))

def load(split):
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    target = torch.tensor(digits.target)
    part = {"train": slice(0, 900), "calibration": slice(900, 1250), "eval": slice(1250, 1797)}[split]
    return TensorDataset(images[part], target[part])
"""

COMMON = {"data": "dense.py:load", "timing": "quick", "max_quality_drop": 1}


@pytest.fixture
def dense(project: Path) -> Path:
    (project / "dense.py").write_text(NET)
    return project


def test_the_target_is_met_and_the_artifact_holds_thin_layers(dense: Path) -> None:
    report = omgoptim.factorize("dense.py:net", target_compression=2, epochs=1, sensitivity=True, **COMMON)
    assert report.before is not None
    assert report.after is not None
    assert report.after.params == pytest.approx((report.before.params or 0) / 2, rel=0.02)
    assert report.artifact is not None
    folder = Path(report.artifact.path)
    module = load_module(folder, Manifest.read(folder), PathPolicy(folder.parents[3]))
    assert isinstance(module.get_submodule("3"), LowRankLinear)
    assert {change.path for change in report.changed} <= {"1", "3", "5"}
    assert report.training is not None
    assert {point.path for point in report.sensitivity} >= {"1", "3"}
    recipe = json.loads((folder / "recipe.json").read_text())["recipe"]
    assert recipe["structural_diff"]["blocks"]["3"]["kind"] == "LowRankLinear"
    image = torch.zeros(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(omgoptim.open_artifact(folder)(image), module(image), atol=1e-5)


@pytest.mark.slow
def test_lora_recovers_on_the_factors_and_what_it_leaves_is_quantized_and_pruned(dense: Path) -> None:
    first = omgoptim.factorize("dense.py:net", target_compression=2, epochs=1, recover="lora", **COMMON)
    assert first.training is not None
    assert first.training.trained_params < first.training.total_params
    assert first.artifact is not None
    folder = Path(first.artifact.path)
    names = load_module(folder, Manifest.read(folder), PathPolicy(folder.parents[3])).state_dict()
    assert not any("lora" in name.lower() for name in names)
    quantized = omgoptim.quantize(first.run_id, scheme="dynamic", runtime="onnxruntime", **COMMON)
    pruned = omgoptim.prune(first.run_id, method="magnitude", sparsity=0.5, epochs=0, **COMMON)
    assert quantized.lineage == [first.run_id, quantized.run_id]
    assert pruned.lineage == [first.run_id, pruned.run_id]
    assert pruned.artifact is not None
    folder = Path(pruned.artifact.path)
    assert isinstance(
        load_module(folder, Manifest.read(folder), PathPolicy(folder.parents[3])).get_submodule("3"), LowRankLinear
    )


def test_no_data_is_enough_for_plain_svd_and_not_for_the_whitened_one(dense: Path) -> None:
    arguments = {"inputs": ["1x1x8x8"], "timing": "quick", "max_quality_drop": 1}
    with pytest.raises(DataError, match="needs data"):
        omgoptim.factorize("dense.py:net", **arguments)
    report = omgoptim.factorize("dense.py:net", method="svd", rank=4, **arguments)
    assert report.after is not None
    assert report.before is not None
    assert (report.after.params or 0) < (report.before.params or 0)


def test_a_target_that_no_ranks_reach_says_what_can_be_reached(dense: Path) -> None:
    with pytest.raises(TechniqueError) as failure:
        omgoptim.factorize("dense.py:net", target_compression=500, **COMMON)
    assert "reach" in str(failure.value)


def test_a_plan_names_ranks_and_changes_nothing(dense: Path) -> None:
    report = omgoptim.factorize("dense.py:net", rank_ratio=0.5, plan=True, **COMMON)
    assert report.artifact is None
    assert any("rank" in change.after for change in report.changed)
