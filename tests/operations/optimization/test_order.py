"""What may follow what: one order, for chains of optimize and for those that a user starts by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from omgoptim.errors import RequestError
from omgoptim.operations.optimization.order import FORBIDDEN, ORDER, refusal
from omgoptim.operations.save_module import require_module


@dataclass
class Quantized:
    """Stands for a loaded int8 artifact."""

    precision: str = "int8"
    module: None = None


def test_the_order_is_a_chain_and_nothing_follows_quantization() -> None:
    for index, before in enumerate(ORDER):
        for later, after in enumerate(ORDER):
            allowed = later >= index and before != "quantize"
            assert (refusal(before, after) is None) == allowed, (before, after)


@pytest.mark.parametrize("verb", ["prune", "factorize", "distill"])
def test_a_quantized_artifact_is_refused_with_the_sentence_of_the_table(verb: str) -> None:
    with pytest.raises(RequestError, match=f"{verb} cannot follow quantization") as refused:
        require_module(Quantized(), verb)  # type: ignore[arg-type]
    assert FORBIDDEN["quantize"] in refused.value.why
