"""Request of `quantize`, and one params class per technique."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from omgoptim.requests.base import RARE, AnyRuntime, ModelRequest, Params, Short, bare_name
from omgoptim.requests.training import ExecutionFields, TrainingFields

Effort = Literal["fast", "balanced", "best"]
Prefer = Literal["balanced", "speed", "size"]
RangeMethod = Literal["auto", "minmax", "moving_average", "percentile", "mse", "entropy"]


class Auto(Params):
    """Try every scheme and engine that this machine can run; keep the best candidate within the quality guard."""

    scheme: Literal["auto"] = "auto"
    calibration_samples: Annotated[int, RARE] = Field(256, ge=1)
    """Number of calibration samples."""


class Dynamic(Params):
    """Int8 weights, activations quantized at run time: Linear, MatMul, LSTM and GRU. Needs no data.

    Example:
        >>> import omgoptim
        >>> omgoptim.Dynamic(granularity="per_tensor").model_dump(exclude_defaults=True)
        {'granularity': 'per_tensor'}
    """

    scheme: Literal["dynamic"] = "dynamic"
    num_bits: Literal[8] = 8
    """Bits per quantized value."""
    granularity: Annotated[Literal["per_channel", "per_tensor"], RARE] = "per_channel"
    """One weight scale per output channel, or one per tensor."""
    embedding_bits: Annotated[Literal[4, 8], RARE] = 8
    """Bits per weight of embedding tables; 4: one scale per 32 weights."""
    targets: Annotated[list[str], Short("Globs on module paths: only these.")] = []
    """Globs on module paths: quantize only these."""
    ignore: Annotated[list[str], Short("Globs on module paths: not these.")] = []
    """Globs on module paths: keep these in float."""


class Static(Params):
    """Int8 weights and activations, activation ranges from calibration data: convolutions and Linear.

    Example:
        >>> import omgoptim
        >>> omgoptim.Static(range_method="mse", equalize=True).model_dump(exclude_defaults=True)
        {'range_method': 'mse', 'equalize': True}
    """

    scheme: Literal["static"] = "static"
    num_bits: Literal[8] = 8
    """Bits per quantized value."""
    granularity: Annotated[Literal["per_channel", "per_tensor"], RARE] = "per_channel"
    """One weight scale per output channel, or one per tensor."""
    embedding_bits: Annotated[Literal[4, 8], RARE] = 8
    """Bits per weight of embedding tables; 4: one scale per 32 weights."""
    symmetric: Annotated[bool, RARE] = False
    """Symmetric activations (zero point 0)."""
    algorithm: Annotated[Literal["auto", "onnxruntime", "nncf"], RARE] = "auto"
    """Quantizer that calibrates and inserts the QDQ nodes; auto tries each that is installed."""
    range_method: Annotated[RangeMethod, RARE] = "auto"
    """Observer of activation ranges; auto: by `effort`."""
    equalize: Annotated[bool | None, RARE] = None
    """Cross-layer equalization; default: by `effort`."""
    bias_correction: Annotated[bool | None, RARE] = None
    """Bias correction: subtract the mean output error of each layer from its bias; default: by `effort`."""
    rounding: Annotated[Literal["auto", "nearest", "small_kernels", "adaround"], RARE] = "auto"
    """Weight rounding: nearest, or learned from the layer's output error: adaround for all layers, small_kernels for
    depthwise and other layers with few inputs; auto: by `effort`."""
    smooth_quant: Annotated[float | None, RARE] = Field(None, ge=0, le=1)
    """SmoothQuant alpha for transformers (algorithm nncf); 0: off."""
    calibration_samples: Annotated[int, RARE] = Field(256, ge=1)
    """Number of calibration samples."""
    targets: list[str] = []
    """Globs on module paths: quantize only these."""
    ignore: list[str] = []
    """Globs on module paths: keep these in float."""


class Qat(TrainingFields, Params):
    """Quantization-aware training (fake quantization in the forward pass), then static int8. Needs training data.

    Example:
        >>> import omgoptim
        >>> omgoptim.Qat(epochs=5).model_dump(exclude_defaults=True)
        {'epochs': 5}
    """

    scheme: Literal["qat"] = "qat"
    num_bits: Literal[8] = 8
    """Bits per quantized value."""
    epochs: int = Field(3, ge=1, le=10_000)
    """Training epochs."""
    learning_rate: Annotated[float | None, RARE] = Field(None, gt=0)
    """Peak learning rate; default: a tenth of the optimizer's default."""
    distill: Annotated[bool | None, Short("Use the original as a teacher.")] = None
    """Use the float model as a teacher; default: only if the data has no targets."""
    equalize: Annotated[bool, RARE] = True
    """Cross-layer equalization, during training and at conversion."""
    granularity: Annotated[Literal["per_channel", "per_tensor"], RARE] = "per_channel"
    """One weight scale per output channel, or one per tensor."""
    embedding_bits: Annotated[Literal[4, 8], RARE] = 8
    """Bits per weight of embedding tables; 4: one scale per 32 weights."""
    symmetric: Annotated[bool, RARE] = False
    """Symmetric activations (zero point 0)."""
    calibration_samples: Annotated[int, RARE] = Field(256, ge=1)
    """Number of calibration samples."""
    targets: list[str] = []
    """Globs on module paths: quantize only these."""
    ignore: list[str] = []
    """Globs on module paths: keep these in float."""


class WeightOnly(Params):
    """Int4 or int8 weights of Linear layers with one scale per group, dequantized at run time. Needs no data.

    Example:
        >>> import omgoptim
        >>> omgoptim.WeightOnly(num_bits=8, group_size=128).model_dump(exclude_defaults=True)
        {'num_bits': 8, 'group_size': 128}
    """

    scheme: Literal["weight_only"] = "weight_only"
    num_bits: Annotated[Literal[4, 8], Short("")] = 4
    """Bits per quantized value."""
    group_size: Annotated[Literal[16, 32, 64, 128, 256], RARE] = 64
    """Weights per scale within an output channel."""
    embedding_bits: Annotated[Literal[4, 8], RARE] = 8
    """Bits per weight of embedding tables; 4: one scale per 32 weights."""
    symmetric: Annotated[bool, RARE] = False
    """Symmetric weights (zero point in the middle of the integer range)."""
    targets: list[str] = []
    """Globs on module paths: quantize only these."""
    ignore: list[str] = []
    """Globs on module paths: keep these in float."""


class Bf16(Params):
    """Weights in bfloat16, half the bytes; computed in bfloat16 if the engine supports it.

    Example:
        >>> import omgoptim
        >>> omgoptim.Bf16().model_dump(exclude_defaults=True)
        {}
    """

    scheme: Literal["bf16"] = "bf16"


class Fp16(Params):
    """Weights in float16, half the bytes; computed in float16 on a GPU, in float32 on most CPUs.

    Example:
        >>> import omgoptim
        >>> omgoptim.Fp16().model_dump(exclude_defaults=True)
        {}
    """

    scheme: Literal["fp16"] = "fp16"


class Fp32(Params):
    """No quantization: the float32 program on another engine, to measure the engine's own speedup.

    Example:
        >>> import omgoptim
        >>> omgoptim.Fp32().model_dump(exclude_defaults=True)
        {}
    """

    scheme: Literal["fp32"] = "fp32"


Scheme = Annotated[
    Auto | Dynamic | Static | Qat | WeightOnly | Bf16 | Fp16 | Fp32,
    Field(discriminator="scheme"),
    BeforeValidator(bare_name("scheme")),
]


class QuantizeRequest(ExecutionFields, ModelRequest):
    """Quantize a model: try schemes and engines, keep the best within the quality guard, measure the saved artifact.

    First choice to make a model smaller or faster. Runs code with the user's rights.
    """

    scheme: Annotated[
        Scheme,
        Short(
            "auto: the best of all within the guard. dynamic: int8, no data. static: int8, calibrated on data. "
            "qat: quantization-aware training. weight_only: smaller, rarely faster. bf16, fp16: half the bytes. "
            "fp32: other engine only."
        ),
    ] = Auto()
    """Quantization scheme: a name, or an object with its parameters; auto tries several."""
    workers: Annotated[int, RARE] = Field(1, ge=1, le=1000)
    """Parallel workers that write the quantized programs of candidates; measurements run in sequence, on the driver."""
    runtime: AnyRuntime = "auto"
    """Engine that runs the artifact; auto tries each that is installed, except torch_compile and executorch."""
    max_quality_drop: Annotated[float, Short("Quality guard: largest allowed drop of the metric.")] = Field(
        0.01, ge=0, le=1
    )
    """Quality guard: largest allowed drop of the metric, before minus after; layers stay in float until it holds."""
    prefer: Annotated[Prefer, RARE] = "balanced"
    """Choice among candidates within the guard. balanced: largest speedup x size ratio; speed: the fastest; size: the
    smallest. If equally fast: the smaller. `omgoptim pick` selects another finalist later."""
    effort: Annotated[Effort, Short("Of static; best takes minutes.")] = "balanced"
    """Effort of static int8. fast: min-max calibration; balanced: adds equalization, bias correction and range search
    (seconds); best: adds AdaRound (minutes)."""
    guard_time_s: Annotated[float, RARE] = Field(600, gt=0, le=10_000_000)
    """Time limit, in seconds, of the mixed-precision search for layers to keep in float, AdaRound included."""
    explain: Annotated[bool, Short("Sensitivity and time per layer.")] = False
    """Report per-layer sensitivity, causes of quality loss, and time by layer type."""
    output: Annotated[str | None, Short("New folder for a copy of the artifact.")] = None
    """New folder for a copy of the artifact; must not exist yet."""
    plan: Annotated[bool, Short("Dry run.")] = False
    """Dry run: print the candidates, their layers and costs, change nothing."""
