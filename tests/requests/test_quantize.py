from __future__ import annotations

import pytest

from omgoptim.errors import RequestError
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.requests.quantize import Qat, Static, WeightOnly


def test_a_value_that_another_scheme_takes_is_told_with_that_scheme() -> None:
    with pytest.raises(RequestError, match=r"'4' is not a value of scheme\.num_bits") as refused:
        parse("quantize", {"model": "net.py:build", "scheme": "static", "num_bits": 4})
    assert refused.value.fix == "scheme weight_only takes it"
    with pytest.raises(RequestError) as refused:
        parse("quantize", {"model": "net.py:build", "scheme": "weight_only", "num_bits": 5})
    assert refused.value.fix == ""


@pytest.mark.parametrize(
    ("given", "params"),
    [
        ({"scheme": "static", "rounding": "adaround", "equalize": False}, Static(rounding="adaround", equalize=False)),
        ({"scheme": "qat", "epochs": 3}, Qat(epochs=3)),
        ({"scheme": "weight_only", "num_bits": 4, "group_size": 64}, WeightOnly(num_bits=4, group_size=64)),
    ],
    ids=["static", "qat", "weight_only"],
)
def test_a_schemes_parameters_stand_beside_the_common_arguments(given: dict[str, object], params: object) -> None:
    request = parse("quantize", {"model": "net.py:build", "effort": "best", "explain": True, **given})
    assert isinstance(request, QuantizeRequest)
    assert request.scheme == params
    assert (request.effort, request.explain) == ("best", True)
