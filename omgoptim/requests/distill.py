"""Request of `distill`, and one params class per kind of student."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from omgoptim.requests.base import RARE, Params, Runtime, Short, before_over_after
from omgoptim.requests.training import ExecutionFields, TrainingRequest


class Given(Params):
    """A student module of your own, with the teacher's inputs."""

    by_source: ClassVar[bool] = True

    student: Literal["given"] = "given"
    source: str = Field(min_length=1)
    """Model source, as for the teacher: file.py:callable, a run id."""
    student_checkpoint: Annotated[str | None, RARE] = None
    """Initial weights of the student: a .safetensors file, or a .pt/.pth state dict."""
    student_kwargs: Annotated[dict[str, Any], RARE] = {}
    """Keyword arguments of the student's callable."""


class Derived(Params):
    """Common parameters of students derived from the teacher."""

    width: Annotated[float, Short("Width multiplier, 0..1.")] = Field(1.0, gt=0, le=1)
    """Width multiplier: fraction of channels, heads and hidden units kept, 0..1."""
    round_to: Annotated[int | None, RARE] = Field(None, ge=1, le=1024)
    """Round widths to multiples of this; default: 8 from 64 channels on."""
    depth: Annotated[float, RARE] = Field(1.0, gt=0, le=1)
    """Depth multiplier: fraction of repeated layers (same input and output shape) kept, 0..1."""
    initialize: Annotated[Literal["teacher", "random"], RARE] = "teacher"
    """Initial weights: from the teacher, or random."""
    targets: list[str] = []
    """Globs on module paths: change only these."""
    ignore: list[str] = []
    """Globs on module paths: do not change these."""


class Narrow(Derived):
    """The teacher with fewer channels, heads and hidden units.

    Example:
        >>> import omgoptim
        >>> omgoptim.Narrow(width=0.25).model_dump(exclude_defaults=True)
        {'width': 0.25}
    """

    student: Literal["narrow"] = "narrow"
    width: Annotated[float, Short("Width multiplier, 0..1.")] = Field(0.5, gt=0, le=1)
    """Width multiplier: fraction of channels, heads and hidden units kept, 0..1."""


class Depthwise(Derived):
    """The teacher with depthwise separable convolutions (depthwise, then 1x1).

    Example:
        >>> import omgoptim
        >>> omgoptim.Depthwise(width=0.75).model_dump(exclude_defaults=True)
        {'width': 0.75}
    """

    student: Literal["depthwise"] = "depthwise"


class InvertedResidual(Derived):
    """The teacher with MobileNetV2's inverted residual blocks instead of its convolutions.

    Example:
        >>> import omgoptim
        >>> omgoptim.InvertedResidual(expansion=4.0).model_dump(exclude_defaults=True)
        {'expansion': 4.0}
    """

    student: Literal["inverted_residual"] = "inverted_residual"
    expansion: Annotated[float, RARE] = Field(2.0, ge=1, le=16)
    """Expansion factor: hidden channels / input channels of a block."""


class LowRank(Derived):
    """The teacher with low-rank factors instead of its large weights.

    Example:
        >>> import omgoptim
        >>> omgoptim.LowRank(rank_ratio=0.5).model_dump(exclude_defaults=True)
        {'rank_ratio': 0.5}
    """

    student: Literal["low_rank"] = "low_rank"
    rank_ratio: float = Field(0.25, gt=0, lt=1)
    """Fraction of parameters kept in each factorized layer, 0..1."""


class FewerLayers(Derived):
    """The teacher with every n-th of its repeated layers (DistilBERT): for transformers and deep stacks.

    Example:
        >>> import omgoptim
        >>> omgoptim.FewerLayers(keep_layers=3).model_dump(exclude_defaults=True)
        {'keep_layers': 3}
    """

    student: Literal["fewer_layers"] = "fewer_layers"
    keep_layers: int | None = Field(None, ge=1)
    """Number of repeated layers to keep, evenly spaced; default: half of them."""

    @model_validator(mode="after")
    def _one_depth(self) -> Self:
        if self.keep_layers is not None and self.depth != 1.0:
            raise ValueError("keep_layers and depth exclude each other; give one")
        return self


class Auto(Params):
    """Derive several students, train the most promising ones briefly (successive halving), and the best one fully."""

    student: Literal["auto"] = "auto"
    target_compression: Annotated[float | None, BeforeValidator(before_over_after)] = Field(None, gt=1, le=10_000)
    """Target: parameters of the teacher / those of the student, at least (default 4; with keep_layers: none)."""
    target_speedup: Annotated[float | None, BeforeValidator(before_over_after)] = Field(None, gt=1, le=1000)
    """Additional target: latency of the teacher / that of the student, measured on this machine, at least."""
    keep_layers: Annotated[int | None, Short("Of the repeated layers.")] = Field(None, ge=1)
    """Number of repeated layers that every student keeps."""
    candidates: Annotated[int, RARE] = Field(6, ge=1, le=32)
    """Students in the first trial; each trial keeps the better half (successive halving)."""
    trial_epochs: Annotated[int, RARE] = Field(1, ge=1, le=1000)
    """Epochs of the first trial; doubled in each further one."""
    targets: list[str] = []
    """Globs on module paths: change only these."""
    ignore: list[str] = []
    """Globs on module paths: do not change these."""

    @property
    def compression(self) -> float | None:
        """Return the compression target, parameters before over after; None where the layers to keep decide."""
        if self.target_compression is None and (self.keep_layers or self.target_speedup):
            return None
        return self.target_compression or 4.0


GIVEN = "given"
STUDENTS = ("auto", GIVEN, "narrow", "depthwise", "inverted_residual", "low_rank", "fewer_layers")


def student_named(value: object) -> object:
    """Return the params of a bare name; any other text is the source of a module."""
    if not isinstance(value, str):
        return value
    return {"student": value} if value in STUDENTS else {"student": GIVEN, "source": value}


Student = Annotated[
    Auto | Given | Narrow | Depthwise | InvertedResidual | LowRank | FewerLayers,
    Field(discriminator="student"),
    BeforeValidator(student_named),
]


class DistillRequest(ExecutionFields, TrainingRequest):
    """Knowledge distillation: train a smaller student on the outputs of the model (the teacher), measure its artifact.

    For the largest savings. Needs training data; labels are optional. Runs code with the user's rights.
    """

    aliases: ClassVar[dict[str, str]] = {"teacher": "model"}

    model: str = Field(min_length=1)
    """The teacher: file.py:callable, package.module:callable, an artifact folder, a run id, model.pt2, hf:FOLDER, timm:NAME or torchvision:NAME."""  # noqa: E501
    student: Annotated[
        Student,
        Short(
            "A module (file.py:callable, a run id), or derived from the teacher: auto, narrow, depthwise, "
            "inverted_residual, low_rank, fewer_layers."
        ),
    ] = Auto()
    """The student: a module (file.py:callable, a run id), or a way to derive one from the teacher."""
    epochs: int = Field(10, ge=1, le=10_000)
    """Training epochs."""
    output_loss: Annotated[Literal["auto", "hinton", "mse", "dkd", "dist"], RARE] = "auto"
    """Distillation loss on the outputs: KL of softened probabilities (hinton), MSE of logits (mse), decoupled KD (dkd), DIST (dist); auto: hinton for classes, MSE and cosine otherwise."""  # noqa: E501
    features: Annotated[Literal["none", "fitnets", "attention", "relational", "minilm"], RARE] = "none"
    """Feature distillation: hidden layers through adapters (fitnets), attention transfer (attention), relational KD (relational), self-attention relations (minilm)."""  # noqa: E501
    feature_weight: Annotated[float, RARE] = Field(1.0, gt=0)
    """Weight of the feature loss."""
    feature_layers: Annotated[list[str], RARE] = []
    """Layer pairs for feature distillation: STUDENT=TEACHER module paths, or one path for both; default: matched by path and shape."""  # noqa: E501
    control: Annotated[bool, Short("Also train without the teacher, for comparison.")] = False
    """Ablation: also train the student without the teacher, report the effect of distillation; doubles the time."""
    runtime: Runtime = "auto"
    """Engine that runs the artifact; both models are measured on it. auto: torch_eager for a module."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """Quality guard: largest allowed drop of the metric, before minus after."""
    output: str | None = None
    """New folder for a copy of the artifact; must not exist yet."""
    plan: bool = False
    """Dry run: print the student that would be trained, train nothing."""
