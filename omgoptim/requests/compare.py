"""What may be asked of `compare`."""

from __future__ import annotations

from pydantic import Field

from omgoptim.requests.base import Request, Timing


class CompareRequest(Request):
    """Measure two artifacts or runs against each other: size, speed, memory, quality and agreement of their outputs."""

    a: str = Field(min_length=1)
    """Baseline: run id or artifact folder."""
    b: str = Field(min_length=1)
    """Candidate, compared with the baseline: run id or artifact folder."""
    data: str | None = None
    """Data source, as for the other commands; default: that of run A."""
    metric: str | None = None
    """Quality metric, as for the other commands; default: that of run A."""
    timing: Timing = "standard"
    """Process launches per latency measurement. quick: one; standard: five, with an interval; careful: until narrow."""
    batch: int = Field(32, ge=1, le=4096)
    """Batch size for throughput; latency is always measured at batch 1."""
    threads: int | None = Field(None, ge=1, le=512)
    """CPU threads of a measured process; default: all cores available."""
    samples: int = Field(2000, ge=1, le=1_000_000)
    """Maximum number of evaluation samples."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Random seed."""
    time_limit_s: float = Field(300, gt=0, le=10_000_000)
    """Timeout, in seconds, of one call into user code."""
    project: str | None = None
    """Absolute path of the project."""
    python: str | None = None
    """Python interpreter with the model's packages; default: the project's .venv, else the active environment."""
    allow_path: list[str] = []
    """Additional folders that may be read."""
    allow_remote_code: bool = False
    """Allow model libraries to run a repository's own code when an artifact is loaded."""
    allow_module: list[str] = []
    """Installed modules whose functions and classes may be used as data or metric."""
    trust_artifact: bool = False
    """Open an artifact from elsewhere even if loading it runs code of this project or of a model library."""
