"""Measurements, outputs, gains, alternatives and changes of layers."""

from __future__ import annotations

from typing import ClassVar, Literal

from omgoptim.reports.base import Record

SMALLER = 1.02
"""Minimum ratio of sizes, memory or counts that is reported as a gain. Chosen: as for times that count as equal
(`AS_FAST`)."""


AGREEMENT_METRICS = (
    "top1_agreement", "r2_agreement", "exact_agreement", "worst_output_agreement", "cosine_agreement", "negative_kl",
)  # fmt: skip
"""Metrics that compare with the original of their own run: no result of a task, and not comparable between runs."""


class TargetMachine(Record):
    """A remote machine that measured."""

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
    """Hardware and software of the measurements."""

    cpu: str
    cpu_features: list[str] = []
    """Instruction sets that matter for low precision, for instance `avx512_vnni`."""
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
    """An artifact, measured after it was opened in a fresh process."""

    runtime: str
    measured_on: str | None = None
    """Address of the machine that measured time, memory and outputs; null: this one."""
    precision: str = "float32"
    size_bytes: int | None = None
    """Bytes on disk of the files that the engine opens: `size_files`."""
    size_files: list[str] = []
    """Names of the files that `size_bytes` counts, without the manifest, the recorded check and additional files."""
    dense_size_bytes: int | None = None
    """Dense size, with every zero stored; null where zeros are not packed."""
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
    """Samples per second at `batch`; null if outputs depend on the batch, the batch is fixed, or a call takes
    long."""
    batch: int | None = None
    peak_memory_bytes: int | None = None
    """Peak resident memory of the fresh process (CPU), or peak allocated memory (GPU)."""
    quality: float | None = None
    metric: str | None = None
    samples: int | None = None
    """Number of evaluation samples for the quality."""


class Gains(Record):
    """Gains of after over before. Low and high are the ends of a 95 % interval."""

    size_ratio: float | None = None
    speedup: float | None = None
    """Ratio of latencies at batch 1, measured in alternating turns: see `docs/timing.md`."""
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
    """Agreement of the outputs before and after, independent of labels, 0..1."""
    launches: int | None = None
    """Number of fresh launches of both processes behind the speedup."""


class Total(Record):
    """Gain over the first original of the lineage, where a run starts from the artifact of another.

    Ratios are those of the two reports. A speedup is null: ratios of two runs cannot be multiplied.
    """

    from_run: str
    """The run that began with the first original."""
    size_ratio: float | None = None
    params_ratio: float | None = None
    macs_ratio: float | None = None
    speedup: float | None = None
    quality_drop: float | None = None
    """Quality drop over both runs; null unless both measured the same metric on the same data."""


class Change(Record):
    """A layer that was changed."""

    path: str
    what: str
    before: str
    after: str
    indirect: bool = False
    """True for a layer that only reads fewer channels, since another layer was changed."""


SkipReason = Literal[
    "excluded",
    "already_compressed",
    "unsupported",
    "not_run",
    "no_benefit",
    "tied",
    "model_output",
    "forward_fails",
    "other",
]
"""Kind of reason for leaving a layer unchanged: left out by `targets`, `ignore`, an option or `requires_grad`;
compressed before; of a kind that the technique does not take; not called, or not reached by inputs or gradients; not
smaller or faster afterwards; tied to another layer, by a shared weight or shared channels; its channels are outputs of
the model; the model does not run without its channels. `other` only in older reports.
"""


class Skip(Record):
    """A layer that was not changed, and the reason."""

    path: str
    reason: str
    """The reason as text; decisions read `kind`."""
    kind: SkipReason = "other"


class Layer(Record):
    """A costly layer."""

    path: str
    kind: str
    time_ms: float | None = None
    """Median time of one call at batch 1, without children."""
    time_share: float | None = None
    macs: int | None = None
    size_bytes: int | None = None
    """Bytes of the layer's own parameters."""


class Candidate(Record):
    """A candidate, planned or built, with its measurements.

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
    """The saved artifact and how to open it."""

    exact: ClassVar[tuple[str, ...]] = ("path",)
    multiline: ClassVar[tuple[str, ...]] = ("load",)

    path: str
    files: dict[str, int]
    """Size in bytes by file name."""
    load: str
    """Python code that opens the artifact."""


class OutputRecord(Record):
    """An output of the model, compared with the original's on the evaluation data."""

    name: str
    shape: list[int | str]
    """Sizes, or the names of dynamic dimensions (`batch`)."""
    dtype: str
    kind: Literal["class_scores", "number", "values", "state", "integers"]
    evidence: str
    """Evidence for the kind."""
    compared_by: Literal["top1_agreement", "r2_agreement", "exact_agreement", "not compared"]
    """`r2_agreement` is 1 - (relative error)^2."""
    weight: float = 1.0
    """Weight in the comparison and in distillation; 0 for an ignored output, or a single number for a whole batch."""
    labelled: bool = False
    """True if the labels belong to it."""
    agreement: float | None = None
    """Agreement with the original, 0..1; null where it was not measured."""
    relative_error: float | None = None
    """Relative error of numbers, values and states: root mean square of the difference, over that of the original about
    its mean.
    """
    cosine: float | None = None
    """Mean cosine similarity over samples, for vector outputs; informative only."""
    ruined: bool = False
    """True for a ruined output: relative error above 0.5, or fewer than half of the classes or integers equal; or
    relative error above 0.9 of entries whose scale is a tenth of the others' or less, such as scores beside boxes. A
    run whose metric does not show it ends as `guard_failed`.
    """
    reopened: float | None = None
    """Largest difference between the artifact, reopened in fresh processes, and the model in memory on the samples in
    `check.npz`, relative to the output's largest value.
    """


class Gain(Record):
    """A factor of a gain. Low and high are the ends of a 95 % interval over launches."""

    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    size_ratio: float | None = None


class GainsBy(Record):
    """A gain as the product of two factors."""

    engine: Gain
    """Gain of the float32 model on the artifact's engine over the original."""
    precision: Gain
    """Gain of the artifact over the float32 model on the same engine: the effect of lower precision."""


class Alternative(Record):
    """Another finalist of the same measurement; `pick` selects it without a new run."""

    name: str
    """Name that `pick` takes."""
    candidate: str
    runtime: str
    precision: str
    best_for: list[Literal["speed", "size", "quality"]] = []
    """Properties in which it is the best of all finalists that pass the quality guard."""
    size_bytes: int | None = None
    size_ratio: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    quality: float | None = None
    """Quality on the evaluation data."""
    quality_drop: float | None = None
    holds: bool
    """True if it passes the quality guard on the evaluation data."""
    path: str
    command: str
    """The call that selects it."""
