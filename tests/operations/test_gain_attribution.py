"""Attribution of gains to engine and precision, and implausible gains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from omgoptim.measure.timing import Ratio, Timing
from omgoptim.operations.gain_attribution import (
    TimedModel,
    gain_split_sentence,
    gains_by,
    implausible_sentence,
    slower_sentence,
    waiting_share,
    waiting_warnings,
)


def side(size: int, *speedups: float, idle: float | None = 0.0) -> TimedModel:
    """One whose launches gave these speedups over the original; the original itself has none."""
    logs = tuple(math.log(value) for value in speedups)
    ratio = Ratio(math.exp(sum(logs) / len(logs)), None, None) if logs else None
    return TimedModel(Timing(1.0, 1.0, None, None, ratio, None, max(1, len(logs)), logs, 40, idle), size)


BEFORE, PLAIN = side(1000), side(1010, 3.0, 3.0, 3.0)


def test_the_two_parts_multiply_to_the_whole() -> None:
    parts = gains_by(BEFORE, PLAIN, side(250, 4.4, 4.5, 4.6), 0.0)
    assert parts.engine.speedup == pytest.approx(3.0)
    assert parts.precision.speedup == pytest.approx((4.4 * 4.5 * 4.6) ** (1 / 3) / 3)
    assert parts.precision.speedup_low is not None
    assert parts.precision.speedup_low < 1.5 < (parts.precision.speedup_high or 0)
    assert parts.engine.size_ratio == pytest.approx(1000 / 1010)
    assert parts.precision.size_ratio == pytest.approx(1010 / 250)
    words = gain_split_sentence(parts, "openvino", "int8")
    assert words == "Speedup by the engine alone (float32 on openvino): 3.00x; by int8 on it: 1.50x."


def test_the_original_on_the_same_engine_leaves_all_to_the_bits() -> None:
    parts = gains_by(BEFORE, BEFORE, side(250, 2.0, 2.0), 0.0)
    assert parts.engine.speedup == 1
    assert parts.precision.speedup == pytest.approx(2.0)


def test_a_single_launch_gives_no_interval_and_an_overloaded_machine_no_ratio() -> None:
    parts = gains_by(BEFORE, side(1010, 3.0), side(250, 6.0), 0.0)
    assert parts.precision.speedup == pytest.approx(2.0)
    assert parts.precision.speedup_low is None
    parts = gains_by(BEFORE, PLAIN, side(250, 6.0, 6.0, 6.0), 0.9)
    assert parts.precision.speedup is None
    assert parts.precision.size_ratio == pytest.approx(1010 / 250)
    assert gain_split_sentence(parts, "openvino", "int8") == ""


def test_int8_that_is_slower_than_float32_on_its_engine_is_told_in_the_unit_of_its_interval() -> None:
    slower = gains_by(BEFORE, PLAIN, side(250, 1.4, 1.5, 1.6), 0.0)
    words = slower_sentence(slower, "openvino", "int8")
    assert words.startswith("int8 is 2.00x slower (1.")
    assert words.endswith("than float32 on openvino, the same engine.")
    unclear = gains_by(BEFORE, PLAIN, side(250, 2.0, 3.0, 4.0), 0.0)
    assert slower_sentence(unclear, "openvino", "int8") == ""
    assert slower_sentence(slower, "openvino", "float32") == ""


def test_a_process_that_waits_and_ratios_that_no_engine_has_are_implausible() -> None:
    usual = gains_by(BEFORE, PLAIN, side(250, 6.0, 6.0), 0.0)
    assert implausible_sentence(usual, BEFORE.timing, "openvino", "cpu", 0.0) == ""
    waits = side(1000, idle=0.98).timing
    words = implausible_sentence(usual, waits, "openvino", "cpu", 0.0)
    assert words.startswith("Implausible speedup: the original waits 98% of its time")
    assert implausible_sentence(usual, waits, "openvino", "cuda", 0.0) == ""  # the processor waits for the GPU
    assert implausible_sentence(None, waits, "openvino", "cpu", 0.0) == words  # float32 there was not measured
    python = gains_by(BEFORE, side(1010, 400.0, 400.0), side(250, 500.0, 500.0), 0.0)
    assert "float32 on openvino alone is 400x faster" in implausible_sentence(
        python, BEFORE.timing, "openvino", "cpu", 0
    )
    bits = gains_by(BEFORE, PLAIN, side(250, 90.0, 90.0, 90.0), 0.0)
    assert "lower precision gives 30x" in implausible_sentence(bits, BEFORE.timing, "openvino", "cpu", 0.0)


def test_waiting_is_told_on_an_overloaded_machine_only_where_it_is_clear() -> None:
    parts = gains_by(BEFORE, PLAIN, side(250, 6.0, 6.0), 0.9)
    sleeps, unsure = replace(BEFORE.timing, idle=0.97), replace(BEFORE.timing, idle=0.6)
    assert waiting_share(sleeps, 0.9, "cpu") == 0.97
    assert waiting_share(unsure, 0.9, "cpu") is None
    assert waiting_share(unsure, 0.0, "cpu") == 0.6
    assert waiting_share(BEFORE.timing, 0.0, "cpu") is None
    words = implausible_sentence(parts, sleeps, "openvino", "cpu", 0.9)
    assert words.startswith("Any speedup would be implausible: the original waits 97% of its time")
    assert implausible_sentence(parts, unsure, "openvino", "cpu", 0.9) == ""


def test_an_artifact_that_waits_as_the_original_does_is_not_called_implausible() -> None:
    parts = gains_by(BEFORE, PLAIN, side(500, 1.0, 1.0), 0.0)
    sleeps = replace(BEFORE.timing, idle=0.97)
    assert implausible_sentence(parts, sleeps, "torch_eager", "cpu", 0.0, sleeps) == ""
    (warning,) = waiting_warnings(sleeps, sleeps, 0.0, "cpu")
    assert warning.startswith("the model waits 97% of its time")
    (warning,) = waiting_warnings(sleeps, BEFORE.timing, 0.9, "cpu")
    assert warning.startswith("Any speedup would be implausible: the original waits 97%")
    assert waiting_warnings(BEFORE.timing, sleeps, 0.0, "cpu") == []
