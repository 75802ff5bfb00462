from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.runtimes import ENGINES, Session, SessionSettings
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.runtimes.torch_engines import to_array, to_tensor

SIGNATURE = Signature((InputTensor("input", "float32", ("batch", 3), False),), "tensor")
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def opened(module: nn.Module, precision: str = "float32", engine: str = "torch_eager") -> Session:
    return ENGINES[engine].open(module, SIGNATURE, SessionSettings(threads=1, precision=precision))


def test_a_session_gives_what_the_module_gives_with_the_threads_asked_for() -> None:
    module = nn.Linear(3, 2)
    session = opened(module)
    assert torch.get_num_threads() == 1
    assert session.module is module
    np.testing.assert_array_equal(session.run({"input": X})[0], module(torch.from_numpy(X)).detach().numpy())
    assert session.seconds(session.prepare({"input": X}), 3) > 0
    assert session.peak_device_bytes() is None


def test_no_gradient_is_kept() -> None:
    session = opened(nn.Linear(3, 2))
    assert not session.call(session.prepare({"input": X})).requires_grad


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision_lowers_floats_on_the_way_in_and_leaves_integers(precision: str, dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    class Seen(nn.Module):
        def forward(self, input: Tensor, ids: Tensor) -> Tensor:
            seen.extend((input.dtype, ids.dtype))
            return input

    ids = InputTensor("ids", "int64", ("batch",), True)
    signature = Signature((*SIGNATURE.inputs, ids), "tensor")
    session = ENGINES["torch_eager"].open(Seen(), signature, SessionSettings(threads=1, precision=precision))
    (output,) = session.run({"input": X, "ids": np.arange(2)})
    assert seen == [dtype, torch.int64]
    assert output.dtype == np.float32


def test_arrays_and_tensors_of_every_dtype_travel() -> None:
    assert to_tensor(X, "bfloat16").dtype == torch.bfloat16
    assert to_tensor(np.asfortranarray(X), "float32").is_contiguous()
    assert to_array(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert to_array(torch.ones(2, dtype=torch.bool)).dtype == np.bool_


@pytest.mark.skipif(ENGINES["torch_compile"].missing("cpu") is not None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.slow
def test_a_compiled_module_gives_what_the_module_gives_for_two_batch_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    session = opened(module, engine="torch_compile")
    for batch in (X, X.repeat(3, axis=0)):
        expected = module(torch.from_numpy(batch)).detach().numpy()
        np.testing.assert_allclose(session.run({"input": batch})[0], expected, rtol=1e-5, atol=1e-6)
