"""What may be asked of `distill`: the request, and one params class per way to a student."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from omgoptim.requests.base import Params, Runtime
from omgoptim.requests.ratios import before_over_after
from omgoptim.requests.training import TrainingRequest


class Given(Params):
    """A smaller module of your own, which takes the teacher's inputs."""

    by_source: ClassVar[bool] = True

    student: Literal["given"] = "given"
    source: str = Field(min_length=1)
    """What to load, as for the teacher: file.py:callable, a run id."""
    student_checkpoint: str | None = None
    """Weights that the student starts from: a .safetensors file, or a .pt/.pth state dict."""
    student_kwargs: dict[str, Any] = {}
    """Keyword arguments for the student's callable."""


class Derived(Params):
    """What the students share that are made from the teacher."""

    width: float = Field(1.0, gt=0, le=1)
    """Fraction of the channels, heads and hidden units that the student has, 0..1."""
    depth: float = Field(1.0, gt=0, le=1)
    """Fraction that it keeps of the layers that repeat (same shape in and out), 0..1."""
    initialize: Literal["teacher", "random"] = "teacher"
    """Weights to begin with: what is left of the teacher's, or random ones."""
    targets: list[str] = []
    """Globs on module paths: change only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these as they are."""


class Narrow(Derived):
    """The teacher with fewer channels, heads and hidden units: pruned, then distilled."""

    student: Literal["narrow"] = "narrow"
    width: float = Field(0.5, gt=0, le=1)
    """Fraction of the channels, heads and hidden units that the student has, 0..1."""


class Depthwise(Derived):
    """The teacher with depth-separable convolutions (a depthwise one, then 1x1) in place of its own."""

    student: Literal["depthwise"] = "depthwise"


class InvertedResidual(Derived):
    """The teacher with MobileNetV2's inverted residual blocks in place of its convolutions."""

    student: Literal["inverted_residual"] = "inverted_residual"
    expansion: float = Field(2.0, ge=1, le=16)
    """Channels inside a block over those that go in."""


class LowRank(Derived):
    """The teacher with products of two thin weights in place of its large ones."""

    student: Literal["low_rank"] = "low_rank"
    rank_ratio: float = Field(0.25, gt=0, lt=1)
    """Parameters kept of each factorized layer, 0..1."""


class FewerLayers(Derived):
    """The teacher with every n-th of its repeated layers, as DistilBERT: for transformers and deep stacks."""

    student: Literal["fewer_layers"] = "fewer_layers"
    keep_layers: int | None = Field(None, ge=1)
    """How many of the repeated layers stay, spread evenly; default: half of them."""

    @model_validator(mode="after")
    def _one_depth(self) -> Self:
        if self.keep_layers is not None and self.depth != 1.0:
            raise ValueError("keep_layers and depth are two goals; give one")
        return self


class Auto(Params):
    """Students derived in several ways: the likeliest few train for a short while, the best of them to the end."""

    student: Literal["auto"] = "auto"
    target_compression: Annotated[float | None, BeforeValidator(before_over_after)] = Field(None, gt=1, le=10_000)
    """Parameters of the teacher over those of the student, at least (default 4; with keep_layers: what that gives)."""
    target_speedup: Annotated[float | None, BeforeValidator(before_over_after)] = Field(None, gt=1, le=1000)
    """Also: latency of the teacher over that of the student, as measured on this machine, at least."""
    keep_layers: int | None = Field(None, ge=1)
    """How many of the repeated layers every student keeps."""
    candidates: int = Field(6, ge=1, le=32)
    """Students that train for a short while; each time the better half goes on."""
    trial_epochs: int = Field(1, ge=1, le=1000)
    """Epochs of the first trial; each further one is twice as long."""
    targets: list[str] = []
    """Globs on module paths: change only these."""
    ignore: list[str] = []
    """Globs on module paths: leave these as they are."""

    @property
    def compression(self) -> float | None:
        """Parameters before over after to reach at least; None where the layers to keep decide."""
        if self.target_compression is None and (self.keep_layers or self.target_speedup):
            return None
        return self.target_compression or 4.0


GIVEN = "given"
STUDENTS = ("auto", GIVEN, "narrow", "depthwise", "inverted_residual", "low_rank", "fewer_layers")


def student_named(value: object) -> object:
    """The params that a bare name stands for; any other text is the source of a module."""
    if not isinstance(value, str):
        return value
    return {"student": value} if value in STUDENTS else {"student": GIVEN, "source": value}


Student = Annotated[
    Auto | Given | Narrow | Depthwise | InvertedResidual | LowRank | FewerLayers,
    Field(discriminator="student"),
    BeforeValidator(student_named),
]


class DistillRequest(TrainingRequest):
    """Train a smaller student to answer as the teacher, the model, does; measure the saved student against it.

    For the largest savings; needs training data, labels are welcome. Runs user code with the user's rights.
    """

    other_names: ClassVar[dict[str, str]] = {"teacher": "model"}

    model: str = Field(min_length=1)
    """The teacher: file.py:callable, package.module:callable, an artifact folder or run id, model.pt2, hf:FOLDER, timm:NAME, torchvision:NAME."""  # noqa: E501
    student: Student = Auto()
    """The student: a module (file.py:callable, a run id), or how to derive one from the teacher."""
    epochs: int = Field(10, ge=1, le=10_000)
    """Training epochs."""
    output_loss: Literal["auto", "hinton", "mse", "dkd", "dist"] = "auto"
    """Distance to the teacher's outputs: softened KL (hinton), squared error of logits, decoupled KD, DIST; auto: hinton for classes, squared error and cosine for values."""  # noqa: E501
    features: Literal["none", "fitnets", "attention", "relational", "minilm"] = "none"
    """Also learn from inside the teacher: layers' outputs through adapters (fitnets), attention maps, distances and angles between samples, relations of the last attention."""  # noqa: E501
    feature_weight: float = Field(1.0, gt=0)
    """Weight of that, beside the other losses."""
    feature_layers: list[str] = []
    """Pairs of layers, STUDENT=TEACHER by module path, or one path for both; default: found by path and shape."""
    control: bool = False
    """Train the same student as long without the teacher too, and say what the teacher brought; twice the time."""
    runtime: Runtime = "auto"
    """Engine of the artifact, on which both models are measured; auto is torch_eager for a module."""
    max_quality_drop: float = Field(0.01, ge=0, le=1)
    """The guard: most quality that may be lost, before minus after."""
    output: str | None = None
    """Folder to put a copy of the artifact in; must not exist yet."""
    plan: bool = False
    """Say which student would be trained, and do nothing."""
