"""A compressed model is called as the original was, on whichever engine it runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from omgoptim.errors import ModelError
from omgoptim.models import artifact as artifacts
from omgoptim.models.forward import first_forward, input_tensors, name_inputs, to_numpy
from omgoptim.models.manifest import Manifest
from omgoptim.models.opened_model import OpenedModel, open_artifact
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import InputTensor, Signature


def as_program(module: nn.Module, raws: list[Any], folder: Path, engine: str = "onnxruntime") -> OpenedModel:
    """The module, exported with inputs as `raws` give them, saved as an artifact and opened again."""
    named = [name_inputs(module, raw) for raw in raws]
    batch = {name: tensor for name, tensor, _ in named[0]}
    signature = first_forward(module, input_tensors(named), batch)
    export_onnx(module, batch, signature, folder / "model.onnx")
    arrays = {name: to_numpy(tensor) for name, tensor in batch.items()}
    outputs = ENGINES[engine].open(folder / "model.onnx", signature, SessionSettings(threads=1)).run(arrays)
    manifest = Manifest(runtime=engine, precision="float32", signature=signature)
    artifacts.save_program(folder / "artifact", folder / "model.onnx", manifest, OutputCheck(arrays, outputs))
    return open_artifact(folder / "artifact", PathPolicy(folder), threads=1)


class Tagger(nn.Module):
    """Two inputs by name, of a free length; a dict of a tensor, a nested tuple and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, ids: Tensor, weight: Tensor) -> dict[str, Any]:
        states, (hidden, cell) = self.rnn(self.table(ids) * weight[..., None])
        return {"logits": states, "last": (hidden, cell), "loss": None}


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    """A batch in another order than the forward's."""
    ids = torch.arange(batch * length).reshape(batch, length) % 9
    return {"weight": ids / 9 + 0.5, "ids": ids}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, OpenedModel]:
    torch.manual_seed(0)
    module = Tagger().eval()
    return module, as_program(module, [tokens(2, 5), tokens(2, 8)], tmp_path_factory.mktemp("tagger"))


@pytest.mark.parametrize(("batch", "length"), [(1, 5), (3, 11)])
def test_a_program_is_called_by_name_and_by_position_as_the_original(
    tagger: tuple[nn.Module, OpenedModel], batch: int, length: int
) -> None:
    module, opened = tagger
    given = tokens(batch, length)
    expected = module(**given)
    for got in (opened(**given), opened(given["ids"], given["weight"]), opened(given["ids"], weight=given["weight"])):
        assert list(got) == ["logits", "last", "loss"]
        assert_allclose(got.logits, expected["logits"].detach(), atol=1e-5)
        assert isinstance(got.last, tuple)
        assert_allclose(got["last"][1], expected["last"][1].detach(), atol=1e-5)
        assert got.loss is None


def test_tensors_in_give_tensors_out_and_arrays_in_give_arrays_out(tagger: tuple[nn.Module, OpenedModel]) -> None:
    _, opened = tagger
    given = tokens(2, 5)
    assert isinstance(opened(**given).logits, Tensor)
    assert isinstance(opened(**{name: tensor.numpy() for name, tensor in given.items()}).logits, np.ndarray)
    mixed = opened(ids=given["ids"].numpy(), weight=given["weight"].requires_grad_())
    assert isinstance(mixed.logits, Tensor)


def test_numbers_are_brought_to_the_dtype_that_the_engine_takes(tagger: tuple[nn.Module, OpenedModel]) -> None:
    _, opened = tagger
    given = tokens(2, 5)
    expected = opened(**given).logits
    for weight in (given["weight"].double(), given["weight"].double().numpy().tolist()):
        assert_allclose(opened(given["ids"].int(), weight).logits, expected, atol=1e-6)
    coarse = opened(given["ids"], given["weight"].bfloat16()).logits
    assert_allclose(coarse, expected, atol=1e-2)
    with pytest.raises(ModelError, match="input 'ids' has dtype float32") as error:
        opened(given["ids"].float(), given["weight"])
    assert error.value.why == "the model takes int64"


def test_inputs_that_do_not_fit_are_named(tagger: tuple[nn.Module, OpenedModel]) -> None:
    _, opened = tagger
    ids = tokens(2, 5)["ids"]
    with pytest.raises(ModelError, match="takes 2 inputs, not 3"):
        opened(ids, ids, ids)
    with pytest.raises(ModelError) as error:
        opened(ids, ids=ids, mask=ids)
    assert error.value.why == "missing ['weight'], unknown ['mask'], given twice ['ids']; it takes ids, weight"


def test_an_opened_model_shows_what_it_takes(tagger: tuple[nn.Module, OpenedModel]) -> None:
    _, opened = tagger
    text = (
        "<omgoptim model on onnxruntime, float32: ids: int64['batch', 'ids_1'], weight: float32['batch', 'weight_1']>"
    )
    assert repr(opened) == text


def test_a_nested_tuple_comes_back_from_openvino_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, batch_first=True).eval()
    opened = as_program(module, [torch.zeros(2, 5, 3)], tmp_path, "openvino")
    x = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(1))
    states, (hidden, cell) = opened(x)
    expected, (expected_hidden, expected_cell) = module(x)
    for got, want in ((states, expected), (hidden, expected_hidden), (cell, expected_cell)):
        assert_allclose(got, want.detach(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_output_reads_as_transformers_own(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    module = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=40))

    def batch(length: int) -> dict[str, Tensor]:
        ids = torch.arange(2 * length).reshape(2, length) % 30
        return {"attention_mask": torch.ones_like(ids), "input_ids": ids, "special_tokens_mask": ids}

    opened = as_program(module.eval(), [batch(6), batch(9)], tmp_path)
    given = batch(12)
    expected, got = module(**given), opened(**given)
    assert list(got) == list(expected)
    assert_allclose(got.last_hidden_state, expected.last_hidden_state.detach(), atol=1e-5)
    assert got[1] is got.pooler_output
    assert_allclose(got[0], expected[0].detach(), atol=1e-5)


def test_a_module_is_called_in_its_own_precision_with_the_users_float_tensors() -> None:
    signature = Signature((InputTensor("input", "float32", ("batch", 3), False),), "tensor")
    module = nn.Linear(3, 2).to(torch.bfloat16)
    session = ENGINES["torch_eager"].open(module, signature, SessionSettings(threads=1, precision="bfloat16"))
    opened = OpenedModel(Manifest("torch_eager", "bfloat16", signature), session)
    x = torch.ones(4, 3)
    got = opened(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, module(x.bfloat16()).float())


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(input), self.bias.sum()


def test_a_scalar_output_stays_a_scalar() -> None:
    module = Scaled(3, 2)
    signature = Signature((InputTensor("input", "float32", ("batch", 3), False),), {"tuple": ["tensor", "tensor"]})
    session = ENGINES["torch_eager"].open(module, signature, SessionSettings(threads=1))
    _, scale = OpenedModel(Manifest("torch_eager", "float32", signature), session)(torch.ones(4, 3))
    assert scale.shape == torch.Size([])
    assert scale.item() == module.bias.sum().item()


def test_an_opened_artifact_evaluates_and_refuses_to_train(tagger: tuple[nn.Module, OpenedModel]) -> None:
    opened = tagger[1]
    assert opened.eval() is opened
    assert opened.train(False) is opened
    with pytest.raises(ModelError, match="cannot be trained"):
        opened.train()


@pytest.mark.parametrize("name", ["parameters", "state_dict", "to"])
def test_what_only_a_module_has_is_refused_with_the_reason(tagger: tuple[nn.Module, OpenedModel], name: str) -> None:
    with pytest.raises(AttributeError, match=r"not a torch\.nn\.Module"):
        getattr(tagger[1], name)
    assert not hasattr(tagger[1], "nonsense")
