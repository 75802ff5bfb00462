from __future__ import annotations

import pytest
from pydantic import ValidationError

from omgoptim.requests.distill import Auto
from omgoptim.requests.factorize import Svd
from omgoptim.requests.prune import Structured


@pytest.mark.parametrize("value", [0.6, "0.6"])
def test_a_fraction_that_is_to_be_left_is_refused_with_the_ratio_that_was_meant(value: object) -> None:
    for params, name in [(Structured, "target_macs_ratio"), (Auto, "target_compression"), (Svd, "target_compression")]:
        with pytest.raises(ValidationError, match=r"before / after, and so above 1; to leave 0.6 of it, give 1.67"):
            params.model_validate({name: value})


def test_ratios_above_one_and_other_values_are_left_to_the_field() -> None:
    assert Structured(target_macs_ratio=2).target_macs_ratio == 2.0
    assert Structured(target_macs_ratio=None).target_macs_ratio is None
    with pytest.raises(ValidationError, match="valid number"):
        Structured.model_validate({"target_macs_ratio": "fast"})
    with pytest.raises(ValidationError, match="greater than 1"):
        Structured(target_macs_ratio=-2)
