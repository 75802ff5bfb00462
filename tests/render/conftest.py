"""Reports written by hand: quantized with a gain, a profile, a plan, three rounds of pruning, factorized, distilled."""

from __future__ import annotations

from pathlib import Path

import pytest

from omgoptim.reports import EfficiencyReport

REPORTS = Path(__file__).parent / "reports"

HOSTILE = "x`\u202e\x1b[31m|\n</title><script>alert(1)</script>\u200b[bold]" + "y" * 5000
"""What a layer of somebody's model may be called."""


def stored(name: str) -> EfficiencyReport:
    return EfficiencyReport.model_validate_json((REPORTS / f"{name}.json").read_text())


@pytest.fixture
def quantized() -> EfficiencyReport:
    return stored("quantized")


@pytest.fixture
def profiled() -> EfficiencyReport:
    return stored("profiled")


@pytest.fixture
def planned() -> EfficiencyReport:
    return stored("planned")


@pytest.fixture
def pruned() -> EfficiencyReport:
    return stored("pruned")


@pytest.fixture
def factorized() -> EfficiencyReport:
    """One whose guard failed."""
    return stored("factorized")


@pytest.fixture
def distilled() -> EfficiencyReport:
    """One with a control, of a student that was derived; the control was worse."""
    return stored("distilled")


@pytest.fixture
def hostile(quantized: EfficiencyReport) -> EfficiencyReport:
    """A giant report whose every free text is hostile."""
    record = quantized.model_dump()
    record["warnings"] = [HOSTILE] * 40
    record["summary"] = HOSTILE
    record["request"]["model"] = HOSTILE
    record["skipped"] = [{"path": f"{HOSTILE}{i}", "reason": f"{HOSTILE}{i % 50}"} for i in range(3000)]
    record["changed"] = [{"path": HOSTILE, "what": HOSTILE, "before": HOSTILE, "after": HOSTILE}] * 500
    record["layers"] = [{"path": HOSTILE, "kind": HOSTILE, "time_ms": 1.0}] * 300
    record["candidates"] = [c | {"why": HOSTILE, "name": HOSTILE} for c in record["candidates"]] * 20
    pruned = stored("pruned").model_dump()
    record["rounds"] = [one | {"why": HOSTILE} for one in pruned["rounds"]] * 30
    record["training"] = pruned["training"] | {"epochs": pruned["training"]["epochs"] * 300, "loss": HOSTILE}
    record["control"] = stored("distilled").model_dump()["control"]
    record["control"]["training"] |= {"epochs": record["training"]["epochs"], "loss": HOSTILE, "stopped": HOSTILE}
    record["sensitivity"] = [
        {"path": f"{HOSTILE}{i}", "amount": 0.5, "quality": 0.9, "quality_drop": i / 1000} for i in range(500)
    ]
    return EfficiencyReport.model_validate(record)
