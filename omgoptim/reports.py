"""What is answered: frozen pydantic models, in the order in which they are read.

One report is at once the MCP structured content, the CLI's `--json`, `report.json` and the source of the HTML page.
What was not measured is `None`, never 0. Ratios are before / after, so that above 1 is always an improvement.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of everything that is answered: immutable, closed, its docstrings are its schema's descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class NextStep(Record):
    """A call that is worth making next, ready to run."""

    tool: str
    arguments: dict[str, Any]
    command: str
    """The same call for a shell."""
    why: str


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
    """CPU time other processes took just before timing, as a fraction of the machine, 0..1."""


class Measurement(Record):
    """One artifact, measured after it was opened in a fresh process."""

    runtime: str
    precision: str = "float32"
    size_bytes: int | None = None
    """Bytes on disk of the files that a deployment needs."""
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
    """Samples per second at `batch`."""
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


class Round(Record):
    """One round of taking away and training back. Qualities come from the selection samples, never from evaluation."""

    number: int
    amount: float | None = None
    """What the round was to reach: sparsity, ratio of channels, or parameters left out, 0..1."""
    params: int | None = None
    nonzero_params: int | None = None
    macs: int | None = None
    speedup: float | None = None
    """Latency of the original over this one's, one launch; only where a speed is the goal."""
    quality_taken: float | None = None
    """Right after weights were taken away."""
    quality_reestimated: float | None = None
    """After the statistics of batch normalization were estimated again, on training inputs without labels; undone where
    that was worse."""
    quality_trained: float | None = None
    """After training; null where there was none."""
    quality_drop: float | None = None
    """The original's quality on the same samples, minus the last of these."""
    kept: bool = False
    """Whether this round's model is the artifact."""
    why: str = ""


class Epoch(Record):
    """One epoch of training."""

    round: int = 1
    epoch: int
    loss: float | None
    """Mean over the epoch's batches; null if it was no number."""
    quality: float | None = None
    """On the selection samples."""
    learning_rate: float
    seconds: float
    best: bool = False
    """Whether its weights were kept."""


class Training(Record):
    """What was trained, how, and how it went."""

    epochs: list[Epoch]
    optimizer: str
    loss: str
    """What was minimized, in words."""
    trained_params: int
    """Parameters that had a gradient: all of them, or the adapters'."""
    total_params: int
    metric: str | None = None
    seconds: float
    resumed: int = 0
    """How often training went on from a checkpoint."""
    stopped: str | None = None
    """Why it ended before its last epoch: patience, or a loss that was no number."""
    teacher_outputs: str | None = None
    """Whether the teacher's outputs were computed once and kept, or for every batch, in words; null without one."""


class Control(Record):
    """The same student, trained as long from the same weights on the same batches, without the teacher."""

    quality: float | None
    """On the evaluation data, from the control's own reopened artifact."""
    gain: float | None = None
    """What the teacher brought: quality of the distilled student minus that of the control, on the same samples."""
    gain_low: float | None = None
    gain_high: float | None = None
    """Ends of a 95 % interval."""
    kept: bool = False
    """Whether the control is the artifact: it was better on the selection samples."""
    training: Training | None = None


class SensitivityPoint(Record):
    """Quality when only this layer or group is compressed, by so much; on the selection samples."""

    path: str
    amount: float
    """Fraction taken away, 0..1."""
    quality: float
    quality_drop: float


class LayerPrecision(Record):
    """What became of one layer with weights, read off both programs and off what the engine says that it runs."""

    path: str
    op: str
    """The operator before."""
    op_after: str
    """The operator after; the same where it was not replaced."""
    shape: list[int]
    """Of the (largest) weight."""
    dtype: str
    """What the weight was stored in."""
    dtype_after: str
    bytes: int
    """Of the weights with their scales and zero points."""
    bytes_after: int
    computed_in: str | None = None
    """What the engine computes it in: int8, bfloat16, float16, float32; null where the engine does not tell."""
    reason: str | None = None
    """Why it was left as it is; null if it was changed."""


class Coverage(Record):
    """Proof of what a quantization changed, from the artifact and the engine that runs it."""

    verdict: Literal["REAL", "SIMULATED", "NO-OP"]
    """REAL: weights are stored in fewer bits, and what is said to be computed in integers is. SIMULATED: integers are
    stored or rounded to, and the engine computes in float although integer arithmetic was the aim. NO-OP: no layer."""
    why: str
    """One sentence."""
    changed: int
    """Layers whose weights are stored in fewer bits."""
    total: int
    """Layers with weights."""
    integer: int | None = None
    """Layers that the engine computes in integers; null where it does not tell."""
    weight_share: float
    """Of the bytes of all weights before, those of changed layers, 0..1."""
    layers: list[LayerPrecision] = []


class LayerNoise(Record):
    """How much one layer's quantization disturbs the model's output, on samples that are not evaluation data."""

    path: str
    kind: str
    sqnr_db: float
    """Signal-to-quantization-noise of the output with only this layer quantized, in dB: the lower, the worse."""
    sqnr_gain_db: float | None = None
    """How much that of the whole quantized model rises with only this layer back in float."""
    recovered: float | None = None
    """Quality that the quantized model gets back with this layer in float; only of the worst few layers."""
    bytes: int
    """Of its float weights: what keeping it in float costs."""


class Finding(Record):
    """Something that is known to hurt quality or speed, found in this model, and what undoing it brought."""

    name: str
    """For instance `spread channels`, `activation outliers`, `mask fill`."""
    paths: list[str]
    """Layers where it was found, the worst first."""
    evidence: str
    """What was measured, with numbers."""
    fix: str
    """What helps."""
    recovered: float | None = None
    """Quality that it brought back, measured on samples that are not evaluation data; null where it was not tried."""


class TimeShare(Record):
    """A kind of layer and its part of the time of one call."""

    kind: str
    time_ms: float
    share: float
    quantized: bool
    """Whether it computes in integers."""


class Explanation(Record):
    """Why quality fell, and why it is not faster."""

    summary: str
    """A few sentences."""
    metric: str
    samples: int
    """On which qualities here were measured."""
    sqnr_db: float | None = None
    """Signal-to-quantization-noise of the quantized model's output."""
    layers: list[LayerNoise] = []
    """The most sensitive first."""
    findings: list[Finding] = []
    times: list[TimeShare] = []
    """Of the artifact, the costliest kind first."""
    speedup_bound: float | None = None
    """Amdahl: how much faster the artifact could still become if its quantized part took no time."""


class Guard(Record):
    """The search for the layers to keep in float so that the guard holds. Qualities come from selection samples."""

    kept_in_float: list[str]
    """Paths of the layers that were kept in float."""
    float_bytes: int
    """Bytes of their weights."""
    evaluations: int
    """Full evaluations that it took, each of a candidate on all selection samples."""
    quality_drop: float
    """Of the candidate it ended with."""
    holds: bool
    seconds: float
    stopped: str | None = None
    """Why it ended early: its time."""
    why: str
    """One sentence: what was bound by what."""


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

    path: str
    files: dict[str, int]
    """File name to bytes."""
    load: str
    """Python that opens the artifact."""


class EfficiencyReport(Record):
    """The answer of every verb that starts a run: the verdict first, then everything that supports it."""

    outcome: Literal["ok", "no_gain", "guard_failed"]
    summary: str
    """Two or three sentences, the verdict first."""
    warnings: list[str] = []
    next_steps: list[NextStep] = []
    verb: str
    run_id: str
    request: dict[str, Any]
    """The request as it was resolved, defaults included."""
    environment: Environment
    before: Measurement | None = None
    after: Measurement | None = None
    gains: Gains | None = None
    changed: list[Change] = []
    skipped: list[Skip] = []
    layers: list[Layer] = []
    rounds: list[Round] = []
    training: Training | None = None
    control: Control | None = None
    sensitivity: list[SensitivityPoint] = []
    candidates: list[Candidate] = []
    coverage: Coverage | None = None
    guard: Guard | None = None
    explanation: Explanation | None = None
    macs_check: MacsCheck | None = None
    artifact: Artifact | None = None
    lineage: list[str] = []
    """Run ids this artifact descends from, oldest first."""
    repeat: str
    """The one command that repeats the run."""


class PackageState(Record):
    """Whether a package can be used, and what to do if it cannot."""

    name: str
    state: Literal["ok", "missing", "broken"]
    version: str | None = None
    unlocks: str
    fix: str | None = None


class DoctorReport(Record):
    """What this machine and this Python can do."""

    outcome: Literal["ok", "incomplete"]
    summary: str
    python: str
    python_found_by: str
    python_version: str
    cpu: str
    cpu_features: list[str]
    cores: int
    gpu: str | None
    runtimes: list[PackageState]
    extras: list[PackageState]
    project: str
    mcp_entry: dict[str, Any]
    """The entry to paste into an MCP client's configuration."""


class RunState(Record):
    """Where a run stands. The file `state.json` of its folder, made true on every read."""

    run_id: str
    verb: str
    status: Literal["starting", "queued", "running", "done", "failed", "cancelled"]
    stage: str = ""
    progress: float | None = None
    """Fraction done, 0..1."""
    eta_s: float | None = None
    started: str
    """ISO 8601, UTC."""
    updated: str
    folder: str
    model: str = ""
    pid: int | None = None
    outcome: str | None = None
    summary: str | None = None
    error: dict[str, str] | None = None
