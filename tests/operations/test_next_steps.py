"""Tests of the calls that a report proposes: each must be the right one, and run as it is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from omgoptim.operations.next_steps import (
    common_arguments,
    engine_argument,
    plan_step,
    profile_steps,
    quantize_steps,
    result_arguments,
)
from omgoptim.reports import Layer
from omgoptim.requests import ModelRequest, QuantizeRequest, parse

SUBJECT: Any = SimpleNamespace(data=SimpleNamespace(real=True), evaluation=SimpleNamespace(count=100))
"""Fields of a loaded model that next steps read: real data, 100 evaluation samples."""


def request(**given: object) -> QuantizeRequest:
    parsed = parse("quantize", {"model": "net.py:build", "data": "net.py:load", **given})
    assert isinstance(parsed, QuantizeRequest)
    return parsed


def test_after_a_plan_comes_the_same_request_for_real() -> None:
    planned = plan_step(request(plan=True, scheme="static", max_quality_drop=0.03, output="out"))
    assert planned.arguments == {
        "model": "net.py:build",
        "data": "net.py:load",
        "scheme": "static",
        "max_quality_drop": 0.03,
        "output": "out",
    }
    assert "--plan" not in planned.command


def test_asking_for_an_interval_keeps_the_guard_and_the_engine_but_not_the_folder_that_exists_now() -> None:
    asked = request(timing="quick", max_quality_drop=0.03, runtime="onnxruntime", output="out")
    first = quantize_steps(asked, "ok", "run-1", has_interval=False, needed=None, loaded=SUBJECT)[0]
    assert parse("quantize", first.arguments) == request(max_quality_drop=0.03, runtime="onnxruntime")


def test_more_samples_are_asked_for_with_everything_else_the_same() -> None:
    asked = request(timing="careful", max_quality_drop=0.03, samples=100)
    first = quantize_steps(asked, "ok", "run-1", has_interval=True, needed=200, loaded=SUBJECT)[0]
    assert parse("quantize", first.arguments) == request(timing="careful", max_quality_drop=0.03, samples=400)


def test_a_call_of_another_verb_keeps_what_its_numbers_depend_on() -> None:
    given = {"model": "net.py:build", "data": "net.py:load", "target_output": "2", "ignore_outputs": ["aux"]}
    measured = {"samples": 100, "threads": 1, "batch": 8, "seed": 3, "target": "ssh://pi@board", "time_limit_s": 9}
    asked = request(**given, **measured, timing="quick", max_quality_drop=0.03, output="out")
    assert common_arguments(asked) == given | measured
    assert result_arguments(asked, "run-1") == common_arguments(asked) | {"model": "run-1"}


def test_quantizing_after_a_profile_is_for_the_engine_that_was_profiled_unless_it_was_torch() -> None:
    loaded: Any = SimpleNamespace(data=SimpleNamespace(real=True), precision="float32")
    layer = Layer(path="body", kind="Conv2d", time_share=0.8, macs=100, size_bytes=400)
    for runtime, kept in (("executorch", "executorch"), ("openvino", "openvino"), ("torch_eager", None)):
        (found,) = profile_steps(request(runtime=runtime), loaded, [layer])
        assert found.arguments.get("runtime") == kept


def test_another_scheme_keeps_the_preference_and_the_engine_where_that_has_the_scheme() -> None:
    assert engine_argument("executorch", "dynamic") == {"runtime": "executorch"}
    assert engine_argument("executorch", "qat") == engine_argument("onnxruntime", "bf16") == {}
    asked = request(runtime="openvino", prefer="size", effort="best")
    loaded: Any = SimpleNamespace(**vars(SUBJECT), module=object())
    trained, half = quantize_steps(asked, "guard_failed", "run-1", has_interval=True, needed=None, loaded=loaded)
    for found, scheme in ((trained, "qat"), (half, "bf16")):
        assert {"scheme": scheme, "runtime": "openvino", "prefer": "size"}.items() <= found.arguments.items()


def test_what_loses_too_much_on_executorch_is_rounded_better_or_stays_in_float() -> None:
    asked = request(runtime="executorch", scheme="static", range_method="mse")
    loaded: Any = SimpleNamespace(**vars(SUBJECT), module=object())
    best, plain = quantize_steps(asked, "guard_failed", "run-1", has_interval=True, needed=None, loaded=loaded)
    assert {"effort": "best", "scheme": "static", "range_method": "mse"}.items() <= best.arguments.items()
    assert (plain.arguments["scheme"], plain.arguments["runtime"]) == ("fp32", "executorch")


@pytest.mark.parametrize(
    ("kind", "macs", "waits", "why"),
    [
        ("Conv2d", 100, None, "smaller and faster at the lowest cost"),
        ("GRU", 100, None, "no engine here has integer kernels for GRU"),
        ("Sequential", None, None, "less time outside of the layers"),
        ("Conv2d", 100, 0.97, "97% of its time is waiting, which quantization does not shorten"),
    ],
)
def test_a_profile_promises_speed_only_where_an_engine_has_integer_kernels(
    kind: str, macs: int | None, waits: float | None, why: str
) -> None:
    loaded: Any = SimpleNamespace(data=SimpleNamespace(real=True), precision="float32")
    layer = Layer(path="body", kind=kind, time_share=0.8, macs=macs, size_bytes=400)
    (planned,) = profile_steps(request(), loaded, [layer], waits)
    assert why in planned.why


@pytest.mark.parametrize(
    ("precision", "shares", "advised"),
    [
        ("float32", (0.6, 0.4), True),
        ("float32", (0.05, 0.95), False),
        ("float32", (None, None), True),
        ("bfloat16", (0.6, 0.4), False),
        ("int8", (0.6, 0.4), False),
    ],
)
def test_profile_advises_quantization_only_where_layers_with_products_take_time(
    precision: str, shares: tuple[float | None, float | None], advised: bool
) -> None:
    """A Linear, and a softmax that no integer computes."""
    product = Layer(path="fc", kind="Linear", macs=1000, size_bytes=4000, time_share=shares[0])
    other = Layer(path="act", kind="Softmax", time_share=shares[1])
    asked = parse("profile", {"model": "net.py:build", "data": "net.py:load"})
    assert isinstance(asked, ModelRequest)
    loaded: Any = SimpleNamespace(precision=precision, data=SimpleNamespace(real=True))
    assert bool(profile_steps(asked, loaded, [product, other])) is advised
