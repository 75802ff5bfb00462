"""Reports: frozen pydantic models, in the order in which they are read.

One report is at once the MCP structured content, the CLI's `--json`, `report.json` and the source of the HTML page.
What was not measured is `None`, never 0. Ratios are before / after, so that above 1 is always an improvement.
"""

from __future__ import annotations

from omgoptim.reports.base import Record
from omgoptim.reports.efficiency import EfficiencyReport, NextStep
from omgoptim.reports.measured import (
    Alternative,
    Artifact,
    Candidate,
    Change,
    CountDisagreement,
    Environment,
    Gain,
    Gains,
    GainsBy,
    Layer,
    MacsCheck,
    Measurement,
    OutputRecord,
    Skip,
    TargetMachine,
    Total,
)
from omgoptim.reports.precision import Coverage, Explanation, Finding, Guard, LayerNoise, LayerPrecision, TimeShare
from omgoptim.reports.state import DoctorReport, LiveRun, PackageState, RunState, StageTime
from omgoptim.reports.training import Control, Epoch, Round, SensitivityPoint, Step, Training

__all__ = [
    "Alternative",
    "Artifact",
    "Candidate",
    "Change",
    "Control",
    "CountDisagreement",
    "Coverage",
    "DoctorReport",
    "EfficiencyReport",
    "Environment",
    "Epoch",
    "Explanation",
    "Finding",
    "Gain",
    "Gains",
    "GainsBy",
    "Guard",
    "Layer",
    "LayerNoise",
    "LayerPrecision",
    "LiveRun",
    "MacsCheck",
    "Measurement",
    "NextStep",
    "OutputRecord",
    "PackageState",
    "Record",
    "Round",
    "RunState",
    "SensitivityPoint",
    "Skip",
    "StageTime",
    "Step",
    "TargetMachine",
    "TimeShare",
    "Total",
    "Training",
]
