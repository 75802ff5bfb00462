"""What was measured, where, and what became of the layers."""

from __future__ import annotations

from typing import ClassVar, Literal

from omgoptim.reports.base import Record

SMALLER = 1.02
"""Ratio of sizes, of memory or of counts below which nothing is called smaller, and nothing is shown as a gain."""


class TargetMachine(Record):
    """A machine that measured for this one."""

    address: str
    cpu: str
    cpu_features: list[str] = []
    cores: int
    memory_bytes: int | None = None
    system: str
    python: str
    versions: dict[str, str]
    """numpy and the engines there."""


class Environment(Record):
    """The hardware and software that gave the numbers."""

    cpu: str
    cpu_features: list[str] = []
    """Instruction sets that decide what low precision gains, for instance `avx512_vnni`."""
    gpu: str | None = None
    device: str = "cpu"
    threads: int
    python: str
    """Path of the Python that ran the model, and how it was found."""
    versions: dict[str, str]
    seed: int
    load: float | None = None
    """CPU time other processes took just before timing, as a fraction of the machine that measured, 0..1."""
    target: TargetMachine | None = None
    """The machine that measured; null: this one."""


class Measurement(Record):
    """One artifact, measured after it was opened in a fresh process."""

    runtime: str
    measured_on: str | None = None
    """Address of the machine that measured time, memory and outputs; null: this one."""
    precision: str = "float32"
    size_bytes: int | None = None
    """Bytes on disk of the files that the engine opens: `size_files`."""
    size_files: list[str] = []
    """Names of the files that `size_bytes` counts, not the manifest, the recorded check and what lies beside."""
    dense_size_bytes: int | None = None
    """The same if every zero were stored as a number; only where zeros are not."""
    params: int | None = None
    nonzero_params: int | None = None
    macs: int | None = None
    """Multiply-accumulates of one sample, counted on the float graph."""
    flops: int | None = None
    """2 x macs."""
    latency_ms_p50: float | None = None
    latency_ms_p90: float | None = None
    """Latency of one call at batch 1."""
    throughput_per_s: float | None = None
    """Samples per second at `batch`; null where the answer depends on the batch, the batch cannot be
    free, or a call takes long."""
    batch: int | None = None
    peak_memory_bytes: int | None = None
    """Peak resident memory of the fresh process (CPU), or peak allocated memory (GPU)."""
    quality: float | None = None
    metric: str | None = None
    samples: int | None = None
    """How many evaluation samples the quality was measured on."""


class Gains(Record):
    """After against before. Low and high are the ends of a 95 % interval."""

    size_ratio: float | None = None
    speedup: float | None = None
    """Ratio of latencies at batch 1: the two took turns, see `docs/timing.md`."""
    speedup_low: float | None = None
    speedup_high: float | None = None
    throughput_ratio: float | None = None
    memory_ratio: float | None = None
    macs_ratio: float | None = None
    quality_drop: float | None = None
    """Quality before minus quality after, on the same samples."""
    quality_drop_low: float | None = None
    quality_drop_high: float | None = None
    agreement: float | None = None
    """How far the two give the same answer, whatever the labels say, 0..1."""
    launches: int | None = None
    """How many fresh launches of both processes the speedup comes from."""


class Total(Record):
    """The artifact against the first original of its lineage, where a run goes on from an earlier one.

    Ratios are those of the two reports. A speedup is null: ratios of two runs cannot be multiplied.
    """

    from_run: str
    """The run that began with the first original."""
    size_ratio: float | None = None
    params_ratio: float | None = None
    macs_ratio: float | None = None
    speedup: float | None = None
    quality_drop: float | None = None
    """Only where both runs measured the same metric on the same data."""


class Change(Record):
    """A layer that was changed."""

    path: str
    what: str
    before: str
    after: str


class Skip(Record):
    """A layer that was left as it is, and why."""

    path: str
    reason: str


class Layer(Record):
    """One of the costliest layers."""

    path: str
    kind: str
    time_ms: float | None = None
    """Median time of one call at batch 1, children not included."""
    time_share: float | None = None
    macs: int | None = None
    size_bytes: int | None = None
    """Bytes of the layer's own parameters."""


class Candidate(Record):
    """Something that was tried, or would be, and how it did.

    `quality` and `quality_drop` of a candidate come from the selection split, never from the evaluation data. The
    `speedup` of one that was only screened is its ratio to the chosen one there times the chosen one's in full.
    """

    name: str
    scheme: str
    runtime: str
    size_bytes: int | None = None
    size_ratio: float | None = None
    speedup: float | None = None
    quality: float | None = None
    quality_drop: float | None = None
    status: Literal["chosen", "finalist", "dropped", "failed", "skipped", "planned"]
    why: str


class CountDisagreement(Record):
    """A layer where the two counters of multiply-accumulates disagree."""

    path: str
    kind: str
    thop: int
    dispatcher: int
    reason: str


class MacsCheck(Record):
    """Two independent counts of the multiply-accumulates of one sample."""

    thop: int | None
    """By module, with thop. Does not see functional calls; counts normalisation layers."""
    dispatcher: int | None
    """By operator, with torch.utils.flop_counter (its FLOPs / 2). Does not see recurrent layers."""
    disagreements: list[CountDisagreement] = []


class Artifact(Record):
    """Where the result is and how to use it."""

    exact: ClassVar[tuple[str, ...]] = ("path",)
    multiline: ClassVar[tuple[str, ...]] = ("load",)

    path: str
    files: dict[str, int]
    """File name to bytes."""
    load: str
    """Python that opens the artifact."""
