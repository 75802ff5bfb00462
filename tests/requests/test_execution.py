"""Tests of the places where work runs, and of the refusal of the Ray Client."""

from __future__ import annotations

import pytest

from omgoptim.errors import RequestError
from omgoptim.requests import parse
from omgoptim.requests.optimize import SearchRequest
from omgoptim.requests.training import is_head


@pytest.mark.parametrize("on", ["local", "ray", "http://head:8265", "https://ray.example.org"])
def test_a_place_is_local_ray_or_the_address_of_a_head(on: str) -> None:
    request = parse("search", {"model": "net.py:space", "target_size_mb": 1, "on": on})
    assert is_head(on) == on.startswith("http")
    assert request.model_dump()["on"] == on


@pytest.mark.parametrize("on", ["slurm", "http://", "http://user@head:8265", "http://head:8265/api", "head:8265"])
def test_another_place_is_refused(on: str) -> None:
    with pytest.raises(RequestError, match="not a valid place to run"):
        parse("optimize", {"model": "net.py:net", "on": on})


def test_the_ray_client_is_refused_with_the_call_of_a_job() -> None:
    with pytest.raises(RequestError, match="does not use the Ray Client") as refused:
        parse("distill", {"model": "net.py:net", "on": "ray://head:10001"})
    assert "on='http://head:8265'" in refused.value.fix


@pytest.mark.parametrize(
    ("given", "in_flight"), [({}, 1), ({"workers": 2}, 6), ({"on": "ray"}, 3), ({"workers": 4, "proposals": 6}, 6)]
)
def test_a_search_has_three_trials_in_flight_per_worker(given: dict[str, object], in_flight: int) -> None:
    request = parse("search", {"model": "net.py:space", "target_size_mb": 1, **given})
    assert isinstance(request, SearchRequest)
    assert request.in_flight == in_flight
