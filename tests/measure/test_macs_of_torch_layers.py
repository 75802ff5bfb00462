"""Every class of torch.nn that has weights is counted: by hand where a matrix is multiplied, as nothing elsewhere."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.measure.macs import count_macs
from omgoptim.measure.program_macs import count_program

x = torch.ones
IDS = torch.zeros(2, 6, dtype=torch.long)

ATTENTION = 4 * 6 * 8 * 8 + 2 * 6 * 6 * 8
"""MACs of one sample with 6 tokens of width 8: four projections, the scores and their product with the values."""

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], int]] = {
    "Linear": (lambda: nn.Linear(3, 4), (x(2, 3),), 3 * 4),
    "Bilinear": (lambda: nn.Bilinear(3, 5, 4), (x(2, 3), x(2, 5)), 3 * 5 * 4),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), (x(2, 3, 8),), 6 * 4 * 3 * 3),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), (x(2, 3, 8, 8),), 6**2 * 4 * 3 * 3**2),
    "Conv3d": (lambda: nn.Conv3d(3, 4, 3), (x(2, 3, 5, 5, 5),), 3**3 * 4 * 3 * 3**3),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (x(2, 3, 8),), 8 * 4 * 3 * 3),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3), (x(2, 3, 8, 8),), 8**2 * 4 * 3 * 3**2),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 4, 3), (x(2, 3, 5, 5, 5),), 5**3 * 4 * 3 * 3**3),
    "RNN": (lambda: nn.RNN(3, 4, batch_first=True), (x(2, 6, 3),), 6 * 4 * (3 + 4)),
    "LSTM": (lambda: nn.LSTM(3, 4, batch_first=True), (x(2, 6, 3),), 6 * 4 * 4 * (3 + 4)),
    "GRU": (lambda: nn.GRU(3, 4, batch_first=True), (x(2, 6, 3),), 6 * 3 * 4 * (3 + 4)),
    "RNNCell": (lambda: nn.RNNCell(3, 4), (x(2, 3),), 4 * (3 + 4)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), (x(2, 3),), 4 * 4 * (3 + 4)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), (x(2, 3),), 3 * 4 * (3 + 4)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (x(2, 6, 8),) * 3, ATTENTION),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (x(2, 6, 8),),
        ATTENTION + 2 * 6 * 8 * 16,
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        (x(2, 6, 8),),
        2 * (ATTENTION + 2 * 6 * 8 * 16),
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        (x(2, 6, 8),) * 2,
        2 * ATTENTION + 2 * 6 * 8 * 16,
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2),
        (x(2, 6, 8),) * 2,
        2 * (2 * ATTENTION + 2 * 6 * 8 * 16),
    ),
    "Transformer": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        (x(2, 6, 8),) * 2,
        3 * ATTENTION + 4 * 6 * 8 * 16,
    ),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 10, [4]),
        (x(2, 8), torch.tensor([1, 2])),
        8 * 5,  # the shortlist and one cluster, into which neither target falls
    ),
    "Embedding": (lambda: nn.Embedding(5, 3), (IDS,), 0),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 3), (IDS,), 0),
    "PReLU": (lambda: nn.PReLU(3), (x(2, 3),), 0),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (x(2, 3),), 0),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (x(2, 3, 4, 4),), 0),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (x(2, 3, 4, 4, 4),), 0),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (x(2, 3, 4),), 0),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (x(2, 4, 3),), 0),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (x(2, 3, 4),), 0),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (x(2, 3, 4, 4),), 0),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(3, affine=True), (x(2, 3, 4, 4, 4),), 0),
    "LayerNorm": (lambda: nn.LayerNorm((3, 4)), (x(2, 3, 4),), 0),
    "RMSNorm": (lambda: nn.RMSNorm((3, 4)), (x(2, 3, 4),), 0),
}

NOT_BUILT = {"RNNBase", "RNNCellBase", "Module", "Container", "DataParallel", "LinearCrossEntropyLoss"}
"""Bases, a wrapper, and a loss, which no model's forward returns outputs of."""


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_torch_counts_what_it_multiplies(name: str) -> None:
    build, args, macs = LAYERS[name]
    count = count_macs(build().eval(), args, {})
    assert count.macs == macs
    assert count.uncounted == {}


def test_no_class_of_torch_with_weights_is_left_out_of_this_test() -> None:
    classes = {name: kind for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    unknown = []
    for name in classes.keys() - LAYERS.keys() - NOT_BUILT:
        if name.startswith("Lazy"):  # becomes one of the others at its first call
            continue
        for arguments in ((), (2,), (2, 2), ((2, 2), (2, 2))):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    weights = list(classes[name](*arguments).parameters())
            except (TypeError, ValueError, AttributeError):
                continue
            unknown += [name] if weights else []
            break
        else:
            unknown.append(name)
    assert unknown == []


class Unseen(nn.Linear):
    """A layer whose product no counter sees: it is no operator of torch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(input.numpy() @ self.weight.detach().numpy().T)


def test_a_layer_with_a_weight_matrix_that_ran_and_counted_nothing_is_named() -> None:
    count = count_macs(nn.Sequential(nn.Linear(3, 4), Unseen(4, 2)), (x(1, 3),), {})
    assert count.macs == 12
    assert count.uncounted == {"1": "Unseen"}


def test_a_normed_weight_costs_its_layer_and_its_parametrization_nothing() -> None:
    count = count_macs(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))), (x(1, 3),), {})
    assert (count.macs, count.uncounted) == (12, {})


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair = nn.Linear(3, 5), nn.Bilinear(3, 5, 4)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.pair(rows, self.first(rows))


def test_an_exported_bilinear_layer_counts_the_products_it_became(tmp_path: Path) -> None:
    from omgoptim.runtimes.export import export_onnx
    from omgoptim.runtimes.signature import InputTensor, Signature

    signature = Signature((InputTensor("rows", "float32", ("batch", 3), False),), "tensor")
    export_onnx(Pair().eval(), {"rows": x(2, 3)}, signature, tmp_path / "pair.onnx")
    count = count_program(tmp_path / "pair.onnx", {"rows": np.ones((1, 3), np.float32)})
    # the linear layer; every weight of the form once; and its sum over the second input, a product of its own there
    assert count.macs == 3 * 5 + 3 * 5 * 4 + 5 * 4


def test_an_expert_that_no_sample_is_sent_to_has_no_multiply_accumulates_and_is_not_uncounted() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + self.idle(x[:0]).sum()

    count = count_macs(Routed(), (torch.randn(1, 4),), {})
    assert (count.macs, count.uncounted) == (12, {})
