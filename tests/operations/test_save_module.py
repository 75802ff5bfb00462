"""Modules that can be changed and trained: none follows quantization."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from omgoptim.errors import RequestError
from omgoptim.operations.save_module import require_module


@dataclass
class Quantized:
    """Stands for a loaded int8 artifact."""

    precision: str = "int8"
    module: None = None


@pytest.mark.parametrize("verb", ["prune", "factorize", "distill"])
def test_a_quantized_artifact_is_refused(verb: str) -> None:
    with pytest.raises(RequestError, match=f"{verb} cannot follow quantization") as refused:
        require_module(Quantized(), verb)  # type: ignore[arg-type]
    assert "the layers of a quantized program are fixed" in refused.value.why
