"""One export of one model per form of inputs and outputs, compared with torch itself."""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.models import onnx_graph
from omgoptim.models.forward import first_forward, input_tensors, name_inputs
from omgoptim.models.onnx_graph import find_layers
from omgoptim.runtimes import ENGINES, SessionSettings, export
from omgoptim.runtimes.engine import NumpyBatch
from omgoptim.runtimes.export import export_onnx, export_pt2
from omgoptim.runtimes.signature import Signature


class Linear(nn.Module):
    """Its forward is what the case says, with `self.fc` at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)


class NestedDict(Linear):
    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"x": y, "parts": [y, (x + 1, y > 0)], "none": None, "best": y.argmax(-1)}


@dataclass
class Answer:
    """An output class that torch.export takes only where it was registered."""

    logits: Tensor
    parts: tuple[Tensor, Tensor]
    loss: Tensor | None = None


class OfFields(Linear):
    def forward(self, x: Tensor) -> Answer:
        y = self.fc(x)
        return Answer(y, (x + 1, y * 2))


Pair = namedtuple("Pair", ["scores", "shifted"])


class OfNames(Linear):
    def forward(self, x: Tensor) -> Pair:
        return Pair(self.fc(x), {"by": x + 1})


class KeywordOnly(Linear):
    def forward(self, x: Tensor, unused: Tensor | None = None, *, scale: Tensor) -> Tensor:
        return self.fc(x) * scale


class Variadic(Linear):
    def forward(self, *parts: Tensor) -> Tensor:
        return self.fc(parts[0]) + self.fc(parts[1])


class Anything(Linear):
    def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
        return self.fc(x) * rest["scale"]


class Pooled(nn.Module):
    """Over a free sequence length, which its two inputs share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return (self.table(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


X, TOKENS = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(14).reshape(2, 7) % 9


def of_length(length: int) -> dict[str, Tensor]:
    return {"ids": TOKENS[:, :1].repeat(1, length), "mask": torch.ones(2, length, dtype=torch.int64)}


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "one tensor": (lambda: nn.Linear(3, 2), [X]),
    "nested dict": (NestedDict, [X]),
    "dataclass": (OfFields, [X]),
    "named tuple": (OfNames, [X]),
    "keyword inputs": (KeywordOnly, [{"scale": X[:, :2], "x": X, "unused": X}]),
    "anything by name": (Anything, [{"scale": X[:, :2], "x": X, "unused": X}]),
    "variadic": (Variadic, [(X, X + 1)]),
    "lstm": (lambda: nn.LSTM(3, 4, batch_first=True), [torch.randn(2, 5, 3)]),
    "free length": (Pooled, [of_length(7), of_length(4)]),
}


def loaded(name: str) -> tuple[nn.Module, dict[str, Tensor], Signature]:
    build, raws = CASES[name]
    torch.manual_seed(0)
    module = build().eval()
    named = [name_inputs(module, raw) for raw in raws]
    batch = {key: tensor for key, tensor, _ in named[0]}
    return module, batch, first_forward(module, input_tensors(named), batch)


def other_batch(name: str, batch: dict[str, Tensor]) -> NumpyBatch:
    """Three samples, where two were exported; and another length, where it is free."""
    rows = {key: tensor[[1, 0, 1]].numpy() for key, tensor in batch.items()}
    return {key: np.tile(array, (1, 3)) for key, array in rows.items()} if name == "free length" else rows


def outputs(engine: str, target: Any, signature: Signature, batch: NumpyBatch) -> list[Any]:
    return ENGINES[engine].open(target, signature, SessionSettings(threads=1)).run(batch)


@pytest.mark.parametrize("name", CASES)
def test_a_program_gives_what_the_module_gives_for_another_batch_on_every_engine(name: str, tmp_path: Path) -> None:
    module, batch, signature = loaded(name)
    export_onnx(module, batch, signature, tmp_path / "model.onnx")
    assert "forward" not in vars(module)
    other = other_batch(name, batch)
    expected = outputs("torch_eager", module, signature, other)
    for engine in ("onnxruntime", "openvino"):
        actual = outputs(engine, tmp_path / "model.onnx", signature, other)
        assert len(actual) == len(expected)
        for one, two in zip(expected, actual, strict=True):
            assert (one.shape, one.dtype) == (two.shape, two.dtype), engine
            assert_allclose(one, two, rtol=1e-4, atol=1e-5, err_msg=engine)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", CASES)
def test_an_exported_pt2_file_gives_exactly_what_the_module_gives(name: str, tmp_path: Path) -> None:
    module, batch, signature = loaded(name)
    export_pt2(module, batch, signature, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    other = other_batch(name, batch)
    for one, two in zip(*(outputs("torch_eager", m, signature, other) for m in (module, again)), strict=True):
        assert_allclose(one, two, rtol=1e-6)


def test_the_program_carries_the_signatures_names_and_nothing_of_the_users_files(tmp_path: Path) -> None:
    import onnx

    module, batch, signature = loaded("nested dict")
    export_onnx(module, batch, signature, tmp_path / "model.onnx")
    program = onnx.load(tmp_path / "model.onnx")
    assert [value.name for value in program.graph.input] == ["x"]
    assert [value.name for value in program.graph.output] == ["x_out", "parts_0", "parts_1_0", "parts_1_1", "best"]
    assert __file__.encode() not in (tmp_path / "model.onnx").read_bytes()


def test_weights_past_the_limit_of_one_file_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_ONE_FILE_BYTES", 8)
    module, batch, signature = loaded("one tensor")
    export_onnx(module, batch, signature, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    expected = outputs("torch_eager", module, signature, {"input": X.numpy()})
    assert_allclose(
        outputs("onnxruntime", tmp_path / "model.onnx", signature, {"input": X.numpy()})[0], expected[0], rtol=1e-6
    )


def test_exporting_neither_changes_the_batch_nor_stores_what_it_is_a_view_of(tmp_path: Path) -> None:
    module, _, signature = loaded("one tensor")
    everything = torch.randn(100_000, 3)
    export_pt2(module, {"input": everything[:2]}, signature, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").stat().st_size < 100_000


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x


@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_a_model_that_cannot_be_exported_gives_torchs_reason_and_no_file(
    write: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = Branches()
    named = name_inputs(module, X)
    signature = first_forward(module, input_tensors([named]), {"x": X})
    level = logging.getLogger("torch.onnx").level
    with pytest.raises(TechniqueError, match="cannot be exported") as error:
        write(module, {"x": X}, signature, tmp_path / "model")
    assert "data-dependent" in error.value.why.lower()
    assert len(error.value.why) < 700
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger("torch.onnx").level == level


class NamedByKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"in": nn.Linear(3, 3), "class": nn.Linear(3, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["class"](self.heads["in"](x))


def test_submodules_named_by_keywords_of_python_are_exported_to_onnx_and_refused_for_pt2(tmp_path: Path) -> None:
    module = NamedByKeywords()
    signature = first_forward(module, input_tensors([name_inputs(module, X)]), {"x": X})
    export_onnx(module, {"x": X}, signature, tmp_path / "model.onnx")
    expected = outputs("torch_eager", module, signature, {"x": X.numpy()})
    assert_allclose(
        outputs("onnxruntime", tmp_path / "model.onnx", signature, {"x": X.numpy()})[0], expected[0], rtol=1e-5
    )
    with pytest.raises(TechniqueError, match=r"\.pt2") as error:
        export_pt2(module, {"x": X}, signature, tmp_path / "model.pt2")
    assert "'heads.in.weight' contains a Python keyword" in error.value.why
    assert not (tmp_path / "model.pt2").exists()


class Denoiser(nn.Module):
    """Scales the spectrum of a signal, and goes back: torch exports the overlap-add with int32 indices."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(8))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 8, 4, window=self.window, return_complex=True)
        return torch.istft(spectrum * self.scale, 8, 4, window=self.window, length=x.shape[-1])


def test_a_spectrum_inside_a_model_runs_in_onnxruntime(tmp_path: Path) -> None:
    module = Denoiser().eval()
    batch = {"x": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}
    signature = first_forward(module, input_tensors([name_inputs(module, [batch["x"]])]), batch)
    export_onnx(module, batch, signature, tmp_path / "model.onnx")
    for x in (batch["x"][:1], batch["x"][[1, 0, 1]]):
        (found,) = outputs("onnxruntime", tmp_path / "model.onnx", signature, {"x": x.numpy()})
        assert_allclose(found, module(x).detach().numpy(), atol=1e-5)


class Collides(nn.Module):
    """Names that torch.fx's GraphModule has too."""

    def __init__(self) -> None:
        super().__init__()
        self.meta, self.graph = nn.Linear(3, 4), nn.Linear(4, 2)
        self.code = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(self.meta(x).relu()) + self.code


def test_layers_named_like_attributes_of_torch_fx_are_exported_under_their_names(tmp_path: Path) -> None:
    module = Collides().eval()
    batch = {"x": X}
    signature = first_forward(module, input_tensors([name_inputs(module, [X])]), batch)
    before = list(module.state_dict())
    export_onnx(module, batch, signature, tmp_path / "model.onnx")
    export_pt2(module, batch, signature, tmp_path / "model.pt2")
    assert list(module.state_dict()) == before
    assert {"meta", "graph", "code"}.isdisjoint(vars(module))
    again = torch.export.load(tmp_path / "model.pt2").module()
    for engine, target in (("onnxruntime", tmp_path / "model.onnx"), ("torch_eager", again)):
        (found,) = outputs(engine, target, signature, {"x": X.numpy()})
        assert_allclose(found, module(X).detach().numpy(), atol=1e-6)
    assert [layer.path for layer in find_layers(onnx_graph.load(tmp_path / "model.onnx"))] == ["meta", "graph"]
