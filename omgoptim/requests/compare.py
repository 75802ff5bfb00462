"""What may be asked of `compare`."""

from __future__ import annotations

from pydantic import Field

from omgoptim.requests.base import Request, Timing


class CompareRequest(Request):
    """Measure two artifacts or runs side by side: size, speed, memory, quality and how far they agree."""

    a: str = Field(min_length=1)
    """The one compared against: run id or artifact folder."""
    b: str = Field(min_length=1)
    """The other one: run id or artifact folder."""
    data: str | None = None
    """Data as for the other verbs; default: what run A was measured with."""
    metric: str | None = None
    """Metric as for the other verbs; default: what run A was measured with."""
    timing: Timing = "standard"
    """quick: one launch, a point estimate; standard: five, with an interval; careful: until it is narrow."""
    batch: int = Field(32, ge=1, le=4096)
    """Batch size of the throughput measurement; latency is always at batch 1."""
    threads: int | None = Field(None, ge=1, le=512)
    """CPU threads for both; default: the cores this process may use."""
    samples: int = Field(2000, ge=1, le=1_000_000)
    """Most evaluation samples to use."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of every random choice."""
    time_limit_s: float = Field(300, gt=0, le=10_000_000)
    """Longest time, in seconds, that one call into the user's code may take."""
    project: str | None = None
    """Absolute path of the user's project."""
    python: str | None = None
    """Python that has the model's packages; default: the project's .venv, else the active environment."""
    allow_path: list[str] = []
    """Further folders that may be read from."""
    allow_remote_code: bool = False
    """Let a model library run a repository's own code, where an artifact is built by it."""
    allow_module: list[str] = []
    """Installed modules whose functions and classes may be named as data or metric."""
    trust_artifact: bool = False
    """Open an artifact that you did not make though its recipe runs code of this project or of a model library."""
