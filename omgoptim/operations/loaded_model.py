"""Loaded model with the inputs of its measurement, the caller's Python objects, and models with a fixed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from omgoptim.errors import DataError, ModelError, RequestError
from omgoptim.measure.launch import LATENCY
from omgoptim.measure.macs import MacsCount
from omgoptim.measure.measuring_process import TimingSetup
from omgoptim.models.data import DataSource, Split
from omgoptim.models.forward import NamedBatch, first_forward, name_inputs
from omgoptim.models.outputs import ModelOutputs
from omgoptim.models.raw_batch import take_samples
from omgoptim.models.recipe import Recipe, read_recipe
from omgoptim.models.samples import Samples, as_tensors, named_samples, nan_samples
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.security.user_code import call_user
from omgoptim.models.source import Source
from omgoptim.requests import ModelRequest, TrainingRequest, verb_of
from omgoptim.runtimes.engine import as_float32
from omgoptim.runtimes.export import DYNAMIC_BATCH_FIX, export_pt2, first_sample
from omgoptim.runtimes.signature import InputTensor, Signature

DOING = "running the model once"
"""Progress message of the first forward pass."""

MAX_SHAPES = 4
"""Further sizes of samples on which a module is run once, first of all. Chosen: each takes a forward pass."""


@dataclass(frozen=True, slots=True)
class InMemoryModel:
    """The model in this process: a module, or a program with its signature."""

    module: nn.Module | None
    program: Path | None
    signature: Signature | None

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs that a program states; empty for a module."""
        return self.signature.input_names if self.signature else []

    @property
    def target(self) -> nn.Module | Path:
        """Module or program for an engine of this process."""
        if self.program is not None:
            return self.program
        if self.module is None:
            raise ModelError("there is neither a module nor a program")
        return self.module


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The loaded model, with all inputs of its measurement."""

    source: Source
    module: nn.Module | None
    """None where the model is a program."""
    program: Path | None
    signature: Signature
    data: DataSource
    evaluation: Samples
    example: NamedBatch
    """Two synthetic samples of the data's kind: for export and for the artifacts' check."""
    baseline: Path
    bench: TimingSetup
    macs: MacsCount | None
    params: tuple[int, int] | None
    """Parameters, and nonzero parameters."""
    precision: str
    """Precision of the model; `module` is a float32 copy of another floating precision."""
    lineage: tuple[str, ...]
    policy: PathPolicy
    device: str
    metric: str | Callable[..., Any]
    eval_folder: Path
    outputs: ModelOutputs
    notes: list[str] = field(default_factory=list)
    batch_dependent: str | None = None
    """Reason why the output for a sample depends on its batch; evaluation and selection use batches of 1 then."""
    fixed_batch: str | None = None
    """Reason for a fixed batch in an export; all samples except training samples are batches of 1 then."""
    recipe: Recipe | None = None
    """Recipe of another module than the original, without its structural diff; None: that of the baseline."""

    def samples(self, split: Split, count: int) -> Samples:
        """Return the first `count` samples of a split, with the model's input names.

        Selection samples are batches of 1 where the output depends on the batch; training samples are not.
        """
        raw = take_samples(self.data.batches(split), count)
        named = [name_inputs(self.module, item.inputs, self.signature.input_names) for item in raw]
        samples = named_samples(named, raw)
        if self.module is not None:
            samples = float32_arrays(samples)
            refuse_nan_samples(self.module, self.signature.inputs, samples, split=split)
        one_by_one = self.batch_dependent or self.fixed_batch
        return samples.one_by_one() if one_by_one and split != "train" else samples


def refuse_nan_samples(
    module: nn.Module | None,
    inputs: Sequence[InputTensor],
    samples: Samples,
    limit_s: float = 300.0,
    split: Split = "eval",
) -> None:
    """Raise a DataError with the number, from 0, of the first sample of a split that holds NaN.

    Not where the module's outputs for it are finite: it may support missing values.
    """
    for number, name, sample in nan_samples(samples)[:1]:
        if module is not None:
            tensors = as_tensors(sample, Signature(tuple(inputs), None).dtypes)
            try:
                call_user(DOING, limit_s, first_forward, module, tuple(inputs), tensors)
            except ModelError:
                pass
            else:
                return
        raise DataError(
            f"sample {number} of the {split} data holds NaN",
            f"its input '{name}' holds it, and the model's outputs for it are NaN too",
            "remove such samples, or replace their missing values, where the data is loaded",
        )


def refuse_unlike_batches(
    module: nn.Module | None, inputs: Sequence[InputTensor], samples: Samples, limit_s: float = 300.0
) -> None:
    """Raise a DataError for an evaluation batch of other sizes than the first, on which the module does not run.

    One batch of each of the first `MAX_SHAPES` further sizes is run.
    """
    seen: list[dict[str, tuple[int, ...]]] = []
    for number, batch in enumerate(samples.batches):
        shapes = {name: array.shape[1:] for name, array in batch.items()}
        if module is None or shapes in seen or len(seen) > MAX_SHAPES:
            continue
        seen.append(shapes)
        try:
            if len(seen) > 1:
                tensors = as_tensors(batch, Signature(tuple(inputs), None).dtypes)
                call_user(DOING, limit_s, first_forward, module, tuple(inputs), tensors)
        except ModelError as error:
            raise DataError(
                f"the model does not run on batch {number} of the eval data",
                f"its samples have shapes {shapes}, those of batch 0 {seen[0]}: {error.why or error.what}",
                "give only samples of sizes that the model accepts, or pad or crop them where the data is loaded",
            ) from error


def refuse_quantized(request: ModelRequest, loaded: LoadedModel) -> None:
    """Raise a RequestError where the model is quantized already."""
    if loaded.precision.startswith("int"):
        raise RequestError(
            f"'{request.model}' is quantized already",
            f"its artifact is in {loaded.precision}; quantizing again would lose more quality",
            f"{verb_of(request)} the float model that it was made from",
        )


def float32_arrays(samples: Samples) -> Samples:
    """Convert floating inputs of the samples to float32, as programs need."""
    batches = [{name: as_float32(array) for name, array in batch.items()} for batch in samples.batches]
    return Samples(batches, samples.targets)


def recipe_of(loaded: LoadedModel) -> Recipe:
    """Return the recipe of the module, by default from the baseline artifact."""
    return loaded.recipe or read_recipe(loaded.baseline)


@dataclass(frozen=True, slots=True)
class Live:
    """Python objects of the caller, in place of named sources."""

    module: nn.Module | None = None
    data: Callable[..., Any] | None = None
    metric: Callable[..., Any] | None = None
    loss: Callable[..., Any] | None = None
    student: nn.Module | None = None
    space: Callable[[Any], Any] | None = None
    resplit: Callable[[DataSource], DataSource] | None = None
    """Replaces the data of a step of another run: the step is evaluated on selection samples of that run."""
    notes: tuple[str, ...] = ()
    """Notes on the module, for example that it was in training mode."""


def recipe_of_live(
    module: nn.Module, signature: Signature, example: NamedBatch, path: Path
) -> tuple[Recipe, str | None]:
    """Export a live module, which a fresh process cannot build, as its recipe.

    Returns:
        The recipe, and the reason for a fixed batch of 1, if so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = as_tensors(example, signature.dtypes)
    fixed = export_pt2(module, tensors, signature, path, or_at_one=True)
    return Recipe("pt2", str(path)), fixed


def by_split(data: Any) -> Callable[..., Iterable[Any]]:
    """Convert data to a callable taking `split`."""
    if callable(data):
        loaded: Callable[..., Iterable[Any]] = data
        return loaded
    if isinstance(data, dict) and "eval" in data:
        splits: dict[str, Iterable[Any]] = data
        return lambda split: splits.get(split, splits.get("calibration", splits.get("train", [])))
    raise RequestError(
        "the data is neither a source, a callable nor a mapping of splits",
        f"received a {type(data).__name__}",
        "give {'calibration': loader, 'eval': loader}; evaluation data is never used for selection",
    )


EXPORT_WITH_DYNAMIC_BATCH = (
    "export it again with a dynamic batch: torch.export.export(…, dynamic_shapes=({0: torch.export.Dim('batch')},)); "
    f"where the model's code has the batch as a number, {DYNAMIC_BATCH_FIX}"
)


def declared_batch(module: nn.Module | None, signature: Signature | None, request: ModelRequest) -> int | None:
    """Return the fixed batch of an exported module or program: 1, or None where it is dynamic.

    Raises:
        ModelError: it is larger than 1; or it is 1, the verb trains, and the module itself was exported.
    """
    size = signature.batch if signature is not None else None
    if size is None and isinstance(module, fx.GraphModule):
        size = _batch_of_placeholders(module)
    if size is not None and size != 1:
        raise ModelError(
            f"'{request.model}' accepts only batches of {size} samples",
            f"it was exported with {size} as the first dimension of its inputs; latency is measured at batch 1",
            EXPORT_WITH_DYNAMIC_BATCH,
        )
    by_code = module is not None and not isinstance(module, fx.GraphModule)  # only its program has a batch of 1
    if size is not None and isinstance(request, TrainingRequest) and not by_code:
        raise ModelError(
            f"'{request.model}' accepts only batches of 1 and cannot be trained",
            "it was exported with 1 as the first dimension of its inputs",
            EXPORT_WITH_DYNAMIC_BATCH,
        )
    return size


def _batch_of_placeholders(module: fx.GraphModule) -> int | None:
    """Return the first input dimension of a module from torch.export, where it is fixed in all inputs."""
    shapes = [
        tuple(node.meta["val"].shape)
        for node in module.graph.nodes
        if node.op == "placeholder" and hasattr(node.meta.get("val"), "shape")
    ]
    sizes = {shape[0] for shape in shapes if shape and isinstance(shape[0], int)}
    return sizes.pop() if len(sizes) == 1 and all(shape and isinstance(shape[0], int) for shape in shapes) else None


def at_batch_one(loaded: LoadedModel, reason: str, work: Path, *, lowered: bool = False) -> LoadedModel:
    """Return the model with signature, example and samples at batch 1, without throughput.

    Args:
        loaded: the original; not changed.
        reason: why the batch cannot be dynamic.
        work: the folder for the evaluation samples as batches of 1.
        lowered: the engine requires batch 1, whatever the model's code does with the batch.
    """
    note = f"{reason}: everything is measured at batch 1, without throughput" if lowered else fixed_batch_note(reason)
    evaluation = loaded.evaluation.one_by_one()
    batches = {LATENCY: loaded.bench.batches[LATENCY]}
    return replace(
        loaded,
        signature=loaded.signature.at_batch(1),
        example=first_sample(loaded.example),
        evaluation=evaluation,
        eval_folder=evaluation.write(work / "eval_at_1"),
        bench=replace(loaded.bench, batches=batches, batch=1),
        fixed_batch=reason,
        notes=[*loaded.notes, note],
    )


def fixed_batch_note(reason: str) -> str:
    """Return the note on a fixed batch."""
    return f"{reason}; export and measurement use batch 1, without throughput. For a dynamic batch, {DYNAMIC_BATCH_FIX}"
