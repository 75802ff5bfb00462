"""What may be asked of `quantize`: the request, and one params class per technique."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from omgoptim.requests.bare_name import bare_name
from omgoptim.requests.base import ModelRequest, Params, Runtime
from omgoptim.requests.training import TrainingFields

Effort = Literal["fast", "balanced", "best"]
Prefer = Literal["balanced", "speed", "size"]
RangeMethod = Literal["auto", "minmax", "moving_average", "percentile", "mse", "entropy"]


class Auto(Params):
    """Try what this machine can run and keep the best candidate whose quality drop is within the guard."""

    scheme: Literal["auto"] = "auto"
    calibration_samples: int = Field(256, ge=1)
    """Samples of the calibration split that static quantization reads its ranges from."""


class Dynamic(Params):
    """Int8 weights, activations quantized on the fly: Linear, MatMul, LSTM and GRU. Needs no data."""

    scheme: Literal["dynamic"] = "dynamic"
    num_bits: Literal[8] = 8
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    """One scale per output channel of a weight, or one for the whole weight."""
    targets: list[str] = []
    """Globs on module paths: quantize only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these in float."""


class Static(Params):
    """Int8 weights and activations, ranges read from calibration data: convolutions and Linear."""

    scheme: Literal["static"] = "static"
    num_bits: Literal[8] = 8
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    """One scale per output channel of a weight, or one for the whole weight."""
    symmetric: bool = False
    """Whether activations use a zero point of 0."""
    algorithm: Literal["auto", "onnxruntime", "nncf"] = "auto"
    """Whose calibration writes the program; auto tries each that is installed."""
    range_method: RangeMethod = "auto"
    """How an activation's range is read from the calibration data; auto: as `effort` says."""
    equalize: bool | None = None
    """Scale channels so that they fill their ranges evenly (cross-layer equalization); default: as `effort` says."""
    bias_correction: bool | None = None
    """Take the mean error of each layer's output back through its bias; default: as `effort` says."""
    rounding: Literal["auto", "nearest", "small_kernels", "adaround"] = "auto"
    """Round each weight to the nearest integer, or the way the layer's output needs (small_kernels: depthwise and other
    layers of few inputs only); auto: as `effort` says."""
    smooth_quant: float | None = Field(None, ge=0, le=1)
    """Share of a transformer's activation outliers that moves into the weights (algorithm nncf); 0: none."""
    calibration_samples: int = Field(256, ge=1)
    """Samples of the calibration split to read ranges from."""
    targets: list[str] = []
    """Globs on module paths: quantize only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these in float."""


class Qat(TrainingFields, Params):
    """Train with int8 simulated, then quantize statically: weights that have learnt to be int8. Needs training data."""

    scheme: Literal["qat"] = "qat"
    num_bits: Literal[8] = 8
    epochs: int = Field(3, ge=1, le=10_000)
    """Training epochs."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; default: a tenth of what suits the optimizer for training."""
    distill: bool | None = None
    """Learn from the float model's outputs too; default: only where the data has no targets."""
    equalize: bool = True
    """Scale channels so that they fill their ranges evenly, while training and at its end; off: plain ranges alone."""
    granularity: Literal["per_channel", "per_tensor"] = "per_channel"
    """One scale per output channel of a weight, or one for the whole weight."""
    symmetric: bool = False
    """Whether activations use a zero point of 0."""
    calibration_samples: int = Field(256, ge=1)
    """Samples of the calibration split to read ranges from."""
    targets: list[str] = []
    """Globs on module paths: quantize only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these in float."""


class WeightOnly(Params):
    """Int4 or int8 weights of Linear layers in groups, packed on disk and unpacked while computing. Needs no data."""

    scheme: Literal["weight_only"] = "weight_only"
    num_bits: Literal[4, 8] = 4
    group_size: Literal[16, 32, 64, 128, 256] = 64
    """Weights of one output channel that share a scale."""
    symmetric: bool = False
    """Whether weights use a zero point in the middle of their range."""
    targets: list[str] = []
    """Globs on module paths: quantize only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these in float."""


class Bf16(Params):
    """Weights stored in bfloat16, half the bytes; computed in bfloat16 where the engine can."""

    scheme: Literal["bf16"] = "bf16"


class Fp16(Params):
    """Weights stored in float16, half the bytes; computed in float16 on a GPU, in float32 on most CPUs."""

    scheme: Literal["fp16"] = "fp16"


class Fp32(Params):
    """No quantization: the float32 program on another engine. What the engine alone brings."""

    scheme: Literal["fp32"] = "fp32"


Scheme = Annotated[
    Auto | Dynamic | Static | Qat | WeightOnly | Bf16 | Fp16 | Fp32,
    Field(discriminator="scheme"),
    BeforeValidator(bare_name("scheme")),
]


class QuantizeRequest(ModelRequest):
    """Quantize a model and keep the best candidate that holds the quality guard, measured from the saved artifact.

    The first thing to try when a model must get smaller or faster. Runs user code with the user's rights.
    """

    scheme: Scheme = Auto()
    """auto, or one technique: its name, or an object with its parameters."""
    runtime: Runtime = "auto"
    """Engine that will run the artifact; auto tries each that is installed."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """The guard: most quality that may be lost, before minus after. Layers are kept in float until it holds."""
    prefer: Prefer = "balanced"
    """What is delivered of all that hold the guard: balanced: the largest speedup times size ratio; speed: the fastest;
    size: the smallest. Of those that are equally fast, the smallest. The others are kept: `omgoptim pick`."""
    effort: Effort = "balanced"
    """What int8 from calibration data may cost: fast reads plain ranges; balanced also equalizes, corrects biases and
    chooses ranges (seconds); best also learns the rounding (minutes)."""
    guard_time_s: float = Field(600, gt=0, le=10_000_000)
    """Longest time, in seconds, that the search for the layers to keep in float may take."""
    explain: bool = False
    """Say layer by layer where quality and time go, and what would help."""
    output: str | None = None
    """Folder to put a copy of the artifact in; must not exist yet."""
    plan: bool = False
    """Say what would be tried, on which layers and at what cost, and do nothing."""
