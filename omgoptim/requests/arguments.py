"""The arguments of each verb, for type checkers and editors.

Written by `make arguments`: edit the requests, not this.
"""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

QuantizeScheme = Literal["auto", "dynamic", "static", "qat", "weight_only", "bf16", "fp16", "fp32"]
PruneMethod = Literal["structured", "magnitude", "wanda", "gradient", "semi_structured", "random"]
FactorizeMethod = Literal["whitened", "svd"]
DistillStudent = Literal["auto", "given", "narrow", "depthwise", "inverted_residual", "low_rank", "fewer_layers"]


class ModelArguments(TypedDict, total=False):
    checkpoint: str | None
    weights: Literal["auto", "ema", "plain"]
    model_kwargs: dict[str, Any]
    inputs: list[str]
    target_output: str | None
    ignore_outputs: list[str]
    device: Literal["auto", "cpu", "cuda"]
    target: str | None
    timing: Literal["quick", "standard", "careful"]
    batch: int
    threads: int | None
    samples: int
    seed: int
    time_limit_s: float
    project: str | None
    python: str | None
    allow_path: list[str]
    allow_remote_code: bool
    allow_module: list[str]
    trust_artifact: bool


class TrainingArguments(ModelArguments, total=False):
    epochs: int | None
    learning_rate: float | None
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"]
    lr_schedule: Literal["cosine", "linear", "constant", "one_cycle"]
    warmup: float
    weight_decay: float
    train_batch: int | None
    accumulate: int
    clip_norm: float
    mixed_precision: Literal["no", "bf16", "fp16"]
    patience: int
    temperature: float
    alpha: float


class RecoveryArguments(TrainingArguments, total=False):
    recover: Literal["full", "lora", "none"]
    lora_rank: int
    lora_alpha: float
    distill: bool


class ProfileArguments(ModelArguments, total=False):
    runtime: Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino", "tensorrt", "executorch"]


class QuantizeArguments(ModelArguments, total=False):
    on: str
    workers: int
    runtime: Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino", "tensorrt", "executorch"]
    max_quality_drop: float
    prefer: Literal["balanced", "speed", "size"]
    effort: Literal["fast", "balanced", "best"]
    guard_time_s: float
    explain: bool
    output: str | None
    plan: bool
    calibration_samples: int
    num_bits: Literal[8] | Literal[4, 8]
    granularity: Literal["per_channel", "per_tensor"]
    embedding_bits: Literal[4, 8]
    targets: list[str]
    ignore: list[str]
    symmetric: bool
    algorithm: Literal["auto", "onnxruntime", "nncf"]
    range_method: Literal["auto", "minmax", "moving_average", "percentile", "mse", "entropy"]
    equalize: bool | None
    bias_correction: bool | None
    rounding: Literal["auto", "nearest", "small_kernels", "adaround"]
    smooth_quant: float | None
    epochs: int
    learning_rate: float | None
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"]
    lr_schedule: Literal["cosine", "linear", "constant", "one_cycle"]
    warmup: float
    weight_decay: float
    train_batch: int | None
    accumulate: int
    clip_norm: float
    mixed_precision: Literal["no", "bf16", "fp16"]
    patience: int
    temperature: float
    alpha: float
    distill: bool | None
    group_size: Literal[16, 32, 64, 128, 256]


class PruneArguments(RecoveryArguments, total=False):
    on: str
    workers: int
    schedule: str
    rounds: int
    sensitivity: bool
    runtime: Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino"]
    max_quality_drop: float
    output: str | None
    plan: bool
    pruning_ratio: float | None
    target_speedup: float | None
    target_latency_ms: float | None
    target_macs_ratio: float | None
    importance: Literal["magnitude", "taylor", "bn_scale", "lamp", "fpgm", "hessian", "random"]
    ranking: Literal["uniform", "global", "isomorphic"]
    round_to: int | None
    max_layer_ratio: float
    reconstruct: bool
    prune_heads: bool
    targets: list[str]
    ignore: list[str]
    sparsity: float
    scope: Literal["global", "per_layer"] | Literal["per_row", "per_layer", "global"]
    layer_ratios: Literal["uniform", "erdos_renyi", "lamp"] | Literal["uniform", "erdos_renyi"]
    score: Literal["sensitivity", "movement"] | Literal["magnitude", "wanda"]
    pattern: str


class FactorizeArguments(RecoveryArguments, total=False):
    on: str
    workers: int
    sensitivity: bool
    runtime: Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino"]
    max_quality_drop: float
    output: str | None
    plan: bool
    target_compression: float | None
    energy: float | None
    rank: int | None
    rank_ratio: float | None
    per: Literal["bytes", "time"]
    convolution: Literal["auto", "tucker2", "spatial", "skip"]
    round_to: int
    targets: list[str]
    ignore: list[str]
    calibration_samples: int


class DistillArguments(TrainingArguments, total=False):
    on: str
    workers: int
    output_loss: Literal["auto", "hinton", "mse", "dkd", "dist"]
    features: Literal["none", "fitnets", "attention", "relational", "minilm"]
    feature_weight: float
    feature_layers: list[str]
    control: bool
    runtime: Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino"]
    max_quality_drop: float
    output: str | None
    plan: bool
    target_compression: float | None
    target_speedup: float | None
    keep_layers: int | None
    candidates: int
    trial_epochs: int
    targets: list[str]
    ignore: list[str]
    student_checkpoint: str | None
    student_kwargs: dict[str, Any]
    width: float
    round_to: int | None
    depth: float
    initialize: Literal["teacher", "random"]
    expansion: float
    rank_ratio: float


class CompareArguments(TypedDict, total=False):
    data: str | None
    metric: str | None
    target: str | None
    timing: Literal["quick", "standard", "careful"]
    batch: int
    threads: int | None
    samples: int
    seed: int
    time_limit_s: float
    project: str | None
    python: str | None
    allow_path: list[str]
    allow_remote_code: bool
    allow_module: list[str]
    trust_artifact: bool


class OptimizeArguments(ModelArguments, total=False):
    on: str
    workers: int
    max_quality_drop: float
    target_latency_ms: float | None
    target_size_mb: float | None
    target_memory_mb: float | None
    budget_minutes: float
    prefer: Literal["balanced", "speed", "size"]
    runtime: Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino"]
    learning_rate: float | None
    output: str | None
    plan: bool


class SearchArguments(TrainingArguments, total=False):
    on: str
    workers: int
    target_latency_ms: float | None
    target_speedup: float | None
    target_size_mb: float | None
    target_memory_mb: float | None
    trials: int
    budget_minutes: float | None
    proposals: int | None
    control: Literal["none", "random"]
    precision: Literal["float32", "int8"]
    stages: int
    max_quality_drop: float
    runtime: Literal["auto", "torch_eager", "torch_compile", "onnxruntime", "openvino"]
    output: str | None
    plan: bool
