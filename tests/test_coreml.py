"""Export of a module artifact to Core ML, which nothing here can run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import omgoptim
from omgoptim.errors import ArtifactError, SetupError
from omgoptim.models.artifact import save_module
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import load_source
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import InputTensor, Signature

NET = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
"""


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    source = load_source("net.py:build", PathPolicy.of(tmp_path, []))
    assert source.module is not None
    assert isinstance(source.recipe, Recipe)
    signature = Signature((InputTensor("input", "float32", ("batch", 3), False),), "tensor")
    x = {"input": np.ones((2, 3), np.float32)}
    outputs = ENGINES["torch_eager"].open(source.module, signature, SessionSettings(1)).run(x)
    manifest = Manifest("torch_eager", "float32", signature)
    save_module(tmp_path / "artifact", source.module, source.recipe, manifest, OutputCheck(x, outputs))
    return tmp_path / "artifact"


def test_without_coremltools_the_export_says_what_to_install(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "coremltools" else found(name, *a))
    with pytest.raises(SetupError) as missing:
        omgoptim.export_coreml(artifact, "net.mlpackage")
    assert missing.value.fix == "pip install coremltools"


def test_a_module_becomes_a_package_and_what_exists_is_never_written(artifact: Path) -> None:
    pytest.importorskip("coremltools")
    written = omgoptim.export_coreml(artifact, "net.mlpackage")
    assert (written / "Manifest.json").is_file()
    with pytest.raises(ArtifactError, match="is not written"):
        omgoptim.export_coreml(artifact, "net.mlpackage")
