"""Requests that only measure: profile and compare."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from omgoptim.requests.base import RARE, AnyRuntime, ModelRequest, Request, Short, Target, Timing


class ProfileRequest(ModelRequest):
    """Measure a model: size, parameters, MACs, latency, throughput, peak memory, quality and cost per layer.

    Start here; changes nothing. Runs code with the user's rights.
    """

    runtime: Annotated[
        AnyRuntime, Short("Engine. auto: the model's own for profile, the fastest for quantize, else torch_eager.")
    ] = "auto"
    """Engine to measure on; auto: that of the model (torch_eager for a module)."""


class CompareRequest(Request):
    """Measure two artifacts or runs against each other: size, speed, memory, quality and agreement of their outputs."""

    a: Annotated[str, Short("Baseline: run id or artifact folder.")] = Field(min_length=1)
    """Baseline: run id or artifact folder."""
    b: Annotated[str, Short("Candidate: run id or artifact folder.")] = Field(min_length=1)
    """Candidate, compared with the baseline: run id or artifact folder."""
    data: str | None = None
    """Data source, as for the other commands; default: that of run A."""
    metric: str | None = None
    """Quality metric, as for the other commands; default: that of run A."""
    target: Target = None
    """Machine to measure on, ssh://[user@]host[:port], through the user's own OpenSSH; default: this machine."""
    timing: Annotated[Timing, RARE] = "standard"
    """Process launches per latency measurement. quick: one; standard: five, with an interval; careful: until narrow."""
    batch: Annotated[int, RARE] = Field(32, ge=1, le=4096)
    """Batch size for throughput; latency is always measured at batch 1."""
    threads: Annotated[int | None, RARE] = Field(None, ge=1, le=512)
    """CPU threads of a measured process; default: all cores available."""
    samples: Annotated[int, RARE] = Field(2000, ge=1, le=1_000_000)
    """Maximum number of evaluation samples."""
    seed: Annotated[int, RARE] = Field(0, ge=0, lt=2**32)
    """Random seed."""
    time_limit_s: Annotated[float, RARE] = Field(300, gt=0, le=10_000_000)
    """Timeout, in seconds, of one call into user code."""
    project: str | None = None
    """Absolute path of the project."""
    python: Annotated[str | None, RARE] = None
    """Python interpreter with the model's packages; default: the project's .venv, else the active environment."""
    allow_path: list[str] = []
    """Additional folders that may be read."""
    allow_remote_code: bool = False
    """Allow model libraries to run a repository's own code when an artifact is loaded."""
    allow_module: list[str] = []
    """Installed modules whose functions and classes may be used as data or metric."""
    trust_artifact: bool = False
    """Open an artifact from elsewhere even if loading it runs code of this project or of a model library."""
