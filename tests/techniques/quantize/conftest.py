"""Small real models, exported once, and the engines that judge what is written."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from omgoptim.models.onnx_file import load
from omgoptim.requests import Params
from omgoptim.techniques.quantize._onnx.preparation import infer_shapes, prepare
from omgoptim.techniques.registry import Outcome, ProgramRun, technique_of

Array = NDArray[Any]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """Hidden 128 is past the size up to which torch's exporter folds the weights by itself."""

    def __init__(self, kind: type[nn.RNNBase], head: bool = True) -> None:
        super().__init__()
        self.rnn = kind(16, 128, batch_first=True)
        self.head = nn.Linear(128, 5) if head else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.pooled = pooled
        self.emb = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.layer(self.emb(x))
        return self.head(tokens.mean(1) if self.pooled else tokens[:, 0])


@dataclass(frozen=True)
class Program:
    path: Path
    sample: Callable[[int, int], Array]
    """`sample(batch, seed)`: inputs of the model."""


def _floats(*shape: int) -> Callable[[int, int], Array]:
    return lambda batch, seed: np.random.default_rng(seed).standard_normal((batch, *shape), dtype=np.float32)


def _ids(batch: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 50, (batch, 9))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Array]]] = {
    "mlp": (Mlp, _floats(32)),
    "cnn": (Cnn, _floats(1, 12, 12)),
    "conv_only": (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), _floats(1, 12, 12)),
    "lstm": (lambda: Recurrent(nn.LSTM), _floats(7, 16)),
    "gru": (lambda: Recurrent(nn.GRU), _floats(7, 16)),
    "gru_only": (lambda: Recurrent(nn.GRU, head=False), _floats(7, 16)),
    "encoder": (Encoder, _ids),
    "pooled_encoder": (lambda: Encoder(pooled=True), _ids),
}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    """`program(name)`: a model of MODELS with seeded weights as an ONNX file, exported once a session."""
    folder = tmp_path_factory.mktemp("programs")
    made: dict[str, Program] = {}

    def get(name: str) -> Program:
        if name not in made:
            build, sample = MODELS[name]
            torch.manual_seed(0)
            module = build().train()
            if name == "cnn":
                with torch.no_grad():
                    module(torch.from_numpy(sample(64, 1)))  # batch norm with statistics of its own
            made[name] = Program(folder / f"{name}.onnx", sample)
            export(module.eval(), torch.from_numpy(sample(2, 0)), made[name].path)
        return made[name]

    return get


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Program]:
    """`exported(module, sample)`: a module of a test's own, with seeded weights, as an ONNX file."""

    def call(module: nn.Module, sample: Callable[[int, int], Array]) -> Program:
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -0.15, 0.15)
        made = Program(tmp_path / "exported.onnx", sample)
        export(module.eval(), torch.from_numpy(sample(2, 0)), made.path)
        return made

    return call


@pytest.fixture(name="infer")
def infer_fixture() -> Callable[..., Array]:
    """`infer(path, x, engine)`: the output of a program."""
    return infer


def export(module: nn.Module, example: torch.Tensor, path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level, _ = logger.level, logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            input_names=["x"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    logger.setLevel(level)
    assert exported is not None
    exported.save(str(path), external_data=False)


@pytest.fixture
def apply(tmp_path: Path) -> Callable[..., tuple[Path, Outcome]]:
    """`apply(program, params)`: run the params' technique; the file it wrote and the outcome."""

    def call(source: Program, params: Params, calibration: list[Array] | None = None) -> tuple[Path, Outcome]:
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        batches = [source.sample(16, seed) for seed in (1, 2)] if calibration is None else calibration
        target = tmp_path / "target.onnx"
        run = ProgramRun([{"x": batch} for batch in batches], scratch)
        outcome = technique_of(params).apply(source.path, target, params, run)
        assert not list(scratch.iterdir()), "temporary files were left behind"
        return target, outcome

    return call


def infer(path: Path, x: Array, engine: str = "onnxruntime") -> Array:
    if engine == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return np.asarray(compiled({"x": x})[0])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["x"]
    return np.asarray(session.run(["output"], {"x": x})[0])


@pytest.fixture
def cosine() -> Callable[..., float]:
    """`cosine(program, path)`: cosine between the outputs of the float program and those of `path`, 64 new samples.

    Batches of 1 and of 5 must run too.
    """

    def call(source: Program, path: Path, engine: str = "onnxruntime") -> float:
        assert len(infer(path, source.sample(1, 9), engine)) == 1
        assert len(infer(path, source.sample(5, 9), engine)) == 5
        x = source.sample(64, 10)
        want, got = infer(source.path, x), infer(path, x, engine)
        return float((want * got).sum() / np.linalg.norm(want) / np.linalg.norm(got))

    return call


@pytest.fixture
def export_onnx(tmp_path: Path) -> Callable[[nn.Module, torch.Tensor], onnx.ModelProto]:
    """`export_onnx(module, example)`: the float program as static quantization prepares it."""

    def call(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
        export(module, example, tmp_path / "exported.onnx")
        return infer_shapes(prepare(load(tmp_path / "exported.onnx"), tmp_path))

    return call
