"""Reports written by hand: quantized with a gain, a profile, a plan, three rounds of pruning, factorized, distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omgoptim.reports import EfficiencyReport

REPORTS = Path(__file__).parent / "reports"

HOSTILE = "x`\u202e\x1b[31m|\n</title><script>alert(1)</script>\u200b[bold]" + "y" * 5000
"""Hostile name of a layer."""


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


COVERAGE: dict[str, Any] = {
    "verdict": "REAL",
    "why": "2 of 3 layers in int8, 98.8 % of the weight bytes; 2 computed in integers by onnxruntime.",
    "changed": 2,
    "total": 3,
    "integer": 2,
    "weight_share": 0.988,
    "layers": [
        {
            "path": f"body.{index}",
            "op": "Conv",
            "op_after": "Conv",
            "shape": [8, 8, 3, 3],
            "dtype": "float32",
            "dtype_after": "float32" if index == 2 else "int8",
            "bytes": 2304,
            "bytes_after": 2304 if index == 2 else 616,
            "computed_in": "float32" if index == 2 else "int8",
            "reason": "left in float by targets or ignore" if index == 2 else None,
        }
        for index in range(3)
    ],
}
GUARD: dict[str, Any] = {
    "kept_in_float": ["body.2", "head"],
    "float_bytes": 2304,
    "evaluations": 4,
    "quality_drop": 0.0031,
    "holds": True,
    "seconds": 12.4,
    "why": "Two layers cost most of the drop.",
}
EXPLANATION: dict[str, Any] = {
    "summary": "Most of the noise comes from one depthwise layer. Half of the time is spent in float.",
    "metric": "top1",
    "samples": 128,
    "sqnr_db": 14.25,
    "layers": [
        {"path": f"block.{index}", "kind": "Conv", "sqnr_db": 15.5 + 4 * index, "sqnr_gain_db": 3.0, "bytes": 288}
        | ({"recovered": 0.0125} if index == 0 else {})
        for index in range(7)
    ],
    "findings": [
        {
            "name": "spread channels",
            "paths": ["block.0", "block.1"],
            "evidence": "channel ranges differ by 41x",
            "fix": "effort balanced equalizes them",
            "recovered": 0.01,
        }
    ],
    "times": [
        {"kind": "QLinearConv", "time_ms": 0.06, "share": 0.6, "quantized": True},
        {"kind": "Softmax", "time_ms": 0.04, "share": 0.4, "quantized": False},
    ],
    "speedup_bound": 2.5,
}
"""Further fields of a report of a guarded and explained quantization."""


@pytest.fixture
def explained(quantized: EfficiencyReport) -> EfficiencyReport:
    """One with coverage, guard and explanation."""
    fields = {"coverage": COVERAGE, "guard": GUARD, "explanation": EXPLANATION}
    return EfficiencyReport.model_validate(quantized.model_dump() | fields)


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
    layer, noise = COVERAGE["layers"][0], EXPLANATION["layers"][0]
    named = {"path": HOSTILE, "op": HOSTILE, "op_after": HOSTILE, "dtype": HOSTILE, "reason": HOSTILE}
    record["coverage"] = COVERAGE | {"why": HOSTILE, "layers": [layer | named | {"computed_in": HOSTILE}] * 400}
    record["guard"] = GUARD | {"kept_in_float": [HOSTILE] * 300, "why": HOSTILE, "stopped": HOSTILE}
    finding = {"name": HOSTILE, "paths": [HOSTILE] * 90, "evidence": HOSTILE, "fix": HOSTILE, "recovered": 0.5}
    record["explanation"] = EXPLANATION | {
        "summary": HOSTILE,
        "metric": HOSTILE,
        "layers": [noise | {"path": HOSTILE, "kind": HOSTILE}] * 300,
        "findings": [finding] * 40,
        "times": [{"kind": HOSTILE, "time_ms": 1.0, "share": 0.01, "quantized": False}] * 90,
    }
    return EfficiencyReport.model_validate(record)
