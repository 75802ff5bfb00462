"""A cell in a Python loop is reported with its number of calls: by hand, 3 layers with 24 + 24 + 1 calls."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.models.samples import Samples
from omgoptim.operations.float_program import layer_calls, unrolled_note
from omgoptim.operations.quantization.build_all import build_progress
from omgoptim.operations.quantization.build_candidates import refuse_beyond_limit
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.cell, self.head = nn.Linear(4, 6), nn.GRUCell(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            state = self.cell(self.project(x[:, step]), state)
        scores: Tensor = self.head(state)
        return scores


def loaded(module: nn.Module | None, steps: int) -> Any:
    signature = Signature((InputTensor("x", "float32", (BATCH, steps, 4), False),), "tensor")
    samples = Samples([{"x": np.ones((2, steps, 4), np.float32)}], [None])
    return SimpleNamespace(module=module, signature=signature, evaluation=samples)


def request(**given: object) -> QuantizeRequest:
    parsed = parse("quantize", {"model": "net.py:build", "data": "net.py:load", **given})
    assert isinstance(parsed, QuantizeRequest)
    return parsed


def test_a_cell_in_a_loop_is_told_with_what_it_costs_and_the_cheaper_call() -> None:
    torch.manual_seed(0)
    module = Looped().eval()
    assert layer_calls(module, loaded(module, 24)) == {"project": 24, "cell": 24, "head": 1}
    note = unrolled_note(loaded(module, 24), request())
    assert note is not None
    assert "is called 24 times in one forward" in note
    assert "49 layer calls for 3 layers" in note
    assert "dynamic" in note
    cheap = unrolled_note(loaded(module, 24), request(scheme="dynamic"))
    assert cheap is not None
    assert "cheaper" not in cheap
    assert not module._forward_pre_hooks


def test_a_few_calls_of_a_shared_layer_are_no_loop_and_a_program_has_none() -> None:
    assert unrolled_note(loaded(Looped().eval(), 5), request()) is None
    assert unrolled_note(loaded(None, 24), request()) is None


def test_a_candidate_of_several_is_given_up_after_its_share_with_that_reason() -> None:
    refuse_beyond_limit(299, 300)
    refuse_beyond_limit(1e9, math.inf)
    with pytest.raises(TechniqueError, match="exceeded its time limit") as error:
        refuse_beyond_limit(301, 300)
    assert "stopped after 301 s" in error.value.why


def test_progress_says_which_candidate_of_how_many_is_made() -> None:
    assert build_progress("static on openvino", 2, 7) == "building candidate 3 of 7, static on openvino"
    assert build_progress("bf16 on openvino", 0, 1) == "building bf16 on openvino"
