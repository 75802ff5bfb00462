from __future__ import annotations

import pytest

from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._ptq.state import apply_preset


@pytest.mark.parametrize(
    ("effort", "ranges", "on", "rounding"),
    [
        ("fast", "minmax", False, "nearest"),
        ("balanced", "auto", True, "small_kernels"),
        ("best", "auto", True, "adaround"),
    ],
)
def test_an_effort_fills_every_open_setting(effort, ranges, on, rounding):
    found = apply_preset(Static(), effort)
    assert (found.range_method, found.rounding) == (ranges, rounding)
    assert (found.equalize, found.bias_correction) == (on, on)


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_what_was_given_wins_over_the_effort(effort):
    given = Static(range_method="mse", equalize=effort == "fast", bias_correction=effort == "fast", rounding="nearest")
    assert apply_preset(given, effort) == given


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_a_resolved_request_is_not_changed_by_balanced(effort):
    once = apply_preset(Static(), effort)
    assert apply_preset(once, "balanced") == once
