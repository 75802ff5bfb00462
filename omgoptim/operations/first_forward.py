"""First run of a model on its data, with checks: NaN, causal language models, precision, determinism, batches."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from omgoptim.errors import DataError, ModelError, OmgoptimError
from omgoptim.measure.macs import MacsCount
from omgoptim.measure.size import stored_precision
from omgoptim.measure.validity_checks import batch_dependence
from omgoptim.models.data import DataSource
from omgoptim.models.forward import NamedBatch, first_forward, input_tensors, name_inputs
from omgoptim.models.labels import predicts_next_token, shifted
from omgoptim.models.output_check import TOLERANCE, max_difference
from omgoptim.models.raw_batch import RawBatch
from omgoptim.models.samples import (
    Samples,
    as_tensors,
    named_samples,
    repeat_to_size,
    synthetic_like,
)
from omgoptim.models.security.user_code import call_user
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import (
    DOING,
    InMemoryModel,
    declared_batch,
    float32_arrays,
    refuse_nan_samples,
    refuse_unlike_batches,
)
from omgoptim.requests import ModelRequest
from omgoptim.runtimes import ENGINES, Session, SessionSettings
from omgoptim.runtimes.engine import as_float32, engine_message
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.runtimes.torch_precision import HALF

RANDOM_SAMPLES = 64
"""Number of random evaluation samples without data: agreement on them does not estimate quality, so few are enough."""

REDUCED = tuple(HALF)
"""Half precisions."""


NEXT_TOKEN_NOTE = "the labels repeat the inputs (causal language model): each position is scored on the next token"


@dataclass(frozen=True, slots=True)
class FirstRun:
    """Result of the first run on the data."""

    data: DataSource
    inputs: tuple[InputTensor, ...]
    evaluation: Samples
    example: NamedBatch
    signature: Signature
    declared_batch: int | None
    """Fixed batch of the export; None where it is dynamic."""
    dependent: str | None
    """Reason why the output for a sample depends on its batch."""
    notes: list[str]

    def in_float32(self) -> FirstRun:
        """Return the samples as a float32 copy of the module takes them."""
        example = {name: as_float32(array) for name, array in self.example.items()}
        return replace(self, evaluation=float32_arrays(self.evaluation), example=example)


def first_run(
    request: ModelRequest, opened: InMemoryModel, data: DataSource, threads: int, context: RunContext
) -> FirstRun:
    """Run the model once on evaluation samples: its signature, and how its outputs depend on labels and batch."""
    raw = data.evaluation(request.samples if data.real else RANDOM_SAMPLES)
    named = [name_inputs(opened.module, item.inputs, opened.input_names) for item in raw]
    evaluation = named_samples(named, raw)
    declared = declared_batch(opened.module, opened.signature, request)
    evaluation = evaluation.one_by_one() if declared else evaluation
    context.progress(DOING, 0.05)
    inputs = input_tensors(named)
    if opened.program and opened.signature:
        refuse_other_inputs(inputs, opened.signature)
    refuse_nan_samples(opened.module, inputs, evaluation, request.time_limit_s)
    refuse_unlike_batches(opened.module, inputs, evaluation, request.time_limit_s)
    example, signature, notes = _example_and_signature(opened, inputs, evaluation, request, declared or 2)
    if is_causal(opened.target, signature, evaluation, request.time_limit_s):
        notes = [*notes, NEXT_TOKEN_NOTE]
        data = with_shifted_labels(data, opened.module)
        evaluation = Samples(evaluation.batches, [shifted(target) for target in evaluation.targets])
    dependent = batch_dependence_of(opened.target, signature, evaluation, threads)
    if dependent:
        notes = [*notes, f"{dependent}; quality is measured at batch 1, and throughput is not measured"]
    return FirstRun(data, inputs, evaluation, example, signature, declared, dependent, notes)


def _example_and_signature(
    opened: InMemoryModel, inputs: tuple[InputTensor, ...], evaluation: Samples, request: ModelRequest, size: int
) -> tuple[NamedBatch, Signature, list[str]]:
    """Return a synthetic example of `size` samples, the signature from real inputs, and notes."""
    real = repeat_to_size(evaluation, size)
    example = synthetic_like(real, request.seed)
    if opened.module is None:
        if opened.signature is None:
            raise ModelError("the program states no signature")
        return example, opened.signature, []
    dtypes = Signature(inputs, None).dtypes
    limit_s = request.time_limit_s
    signature = call_user(DOING, limit_s, first_forward, opened.module, inputs, as_tensors(real, dtypes))
    signature = signature.at_batch(1) if size == 1 else signature
    try:
        call_user(DOING, limit_s, first_forward, opened.module, inputs, as_tensors(example, dtypes))
    except ModelError:  # inputs with constraints, such as lengths and offsets
        return real, signature, ["the model does not run on random inputs: check.npz holds evaluation samples"]
    return example, signature, []


def is_causal(target: nn.Module | Path, signature: Signature, evaluation: Samples, limit_s: float) -> bool:
    """Return whether the labels are those of a causal language model; see `predicts_next_token`.

    `target` is the module, or the program's file.
    """
    engine = ENGINES["torch_eager" if isinstance(target, nn.Module) else "onnxruntime"]
    sessions: list[Session] = []

    def run(batch: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        if not sessions:  # opened only where the labels may be causal
            sessions.append(engine.open(target, signature, SessionSettings(threads=1)))
        outputs: list[NDArray[Any]] = call_user(DOING, limit_s, sessions[0].run, batch)
        return outputs

    head, _ = evaluation.split(2)
    return bool(head.batches) and predicts_next_token(head.batches[0], head.targets[0], run)


def with_shifted_labels(data: DataSource, module: nn.Module | None) -> DataSource:
    """Shift labels to the next token; not for training where the model shifts them itself."""

    def shift(batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
        return (replace(raw, target=shifted(raw.target)) for raw in batches)

    own_loss = module is not None and "labels" in inspect.signature(module.forward).parameters
    return replace(
        data,
        batches=lambda split: shift(data.batches(split)),
        epoch=data.epoch if own_loss else lambda size: shift(data.epoch(size)),
    )


def precision_of_module(module: nn.Module, inputs: Sequence[InputTensor]) -> tuple[str, list[str]]:
    """Return the precision of a module, and notes on one other than float32.

    Of mixed precisions the one with most bytes, unless its floating inputs differ: the module casts by itself then.
    """
    precision, stored = stored_precision(module)
    notes = []
    if len(stored) > 1:
        parts = ", ".join(f"{_share(size / sum(stored.values()))} {name}" for name, size in stored.items())
        notes.append(f"the model's weights and buffers are of mixed precision ({parts} by bytes)")
        if any(t.dtype.startswith(("float", "bfloat")) and t.dtype != precision for t in inputs):
            return "float32", notes
    if precision not in ("float32", *REDUCED, "float64"):
        return "float32", [f"the model's weights are {precision}"]
    if precision != "float32":
        notes.append(f"the model is in {precision}: it is measured as such, and compressed from a float32 copy")
    return precision, notes


def _share(fraction: float) -> str:
    return "under 1%" if fraction < 0.01 else "over 99%" if fraction > 0.99 else f"{fraction:.0%}"


def float32_copy(module: nn.Module) -> nn.Module:
    """Copy a module with floating weights and buffers as float32."""
    return copy.deepcopy(module).float()


def refuse_fixed_casts(opened: InMemoryModel, signature: Signature, example: NamedBatch, precision: str) -> None:
    """Raise a ModelError where the float32 copy of a module in another precision does not run.

    Args:
        opened: with the copy.
        signature: of the copy.
        example: a batch on which the original runs.
        precision: of the original.
    """
    try:
        ENGINES["torch_eager"].open(opened.target, signature, SessionSettings(threads=1)).run(example)
    except Exception as error:  # whatever the user's forward raises in float32
        raise ModelError(
            f"the float32 copy of the model, which is in {precision}, does not run",
            engine_message(error),
            f"in forward, cast to the dtype of the weights instead of {precision}: x.to(self.layer.weight.dtype)",
        ) from error


def float32_signature(signature: Signature) -> Signature:
    """Return the signature with floating inputs as float32."""
    inputs = tuple(
        replace(tensor, dtype="float32") if tensor.dtype in (*REDUCED, "float64") else tensor
        for tensor in signature.inputs
    )
    return replace(signature, inputs=inputs)


def count_notes(macs: MacsCount | None) -> list[str]:
    """Return a note on layers without a count of multiply-accumulates."""
    kinds = sorted(set(macs.uncounted.values())) if macs else []
    return [f"the multiply-accumulates exclude {', '.join(kinds)}, which cannot be counted"] if kinds else []


def deterministic_outputs(session: Session, example: NamedBatch) -> list[NDArray[Any]]:
    """Return the outputs for a batch, which must be the same in two calls.

    Raises:
        ModelError: it does not run, or its outputs differ in the second call.
    """
    kept = {name: array.copy() for name, array in example.items()}
    try:
        outputs, again = session.run(example), session.run(example)
    except OmgoptimError:
        raise
    except Exception as error:  # engines raise kinds of their own without a common base
        raise ModelError("the model does not run on a batch of two samples", engine_message(error)) from error
    difference = max_difference(outputs, again)
    if difference > TOLERANCE["float32"]:
        changed = [name for name, array in kept.items() if array.tobytes() != example[name].tobytes()]
        if changed:
            raise ModelError(
                "the model changes its inputs in place",
                f"after a call '{changed[0]}' has other values, which changes the outputs of the next call",
                "write forward without in-place operations on its inputs: x = x * 2 in place of x.mul_(2)",
            )
        raise ModelError(
            "the model is not deterministic",
            f"two calls on the same inputs differ by {difference:.3g} of the outputs' scale",
            "remove randomness in eval mode (functional dropout needs training=self.training) and state between calls",
        )
    return outputs


def refuse_other_inputs(inputs: tuple[InputTensor, ...], signature: Signature) -> None:
    """Raise a DataError where the data's inputs do not match the program's."""
    given = {tensor.name: tensor for tensor in inputs}
    for wanted in signature.inputs:
        found = given.get(wanted.name)
        if found is None:
            raise DataError(f"the data has no input '{wanted.name}'", f"it has {', '.join(given)}")
        if found.dtype != wanted.dtype or len(found.shape) != len(wanted.shape):
            raise DataError(
                f"input '{wanted.name}' does not match the program",
                f"the data has {found.dtype} with {len(found.shape)} dimensions, "
                f"the program takes {wanted.dtype} with {len(wanted.shape)}",
            )


def batch_dependence_of(
    target: nn.Module | Path, signature: Signature, evaluation: Samples, threads: int
) -> str | None:
    """Describe how the output for a sample depends on its batch; None where it does not.

    `target` is the module, or the program's file.
    """
    engine = ENGINES["torch_eager" if isinstance(target, nn.Module) else "onnxruntime"]
    session = engine.open(target, signature, SessionSettings(threads=threads))
    if not isinstance(target, nn.Module):
        return batch_dependence(session.run, evaluation)
    own = [
        path for path, layer in target.named_modules() if isinstance(layer, _BatchNorm) and layer.running_mean is None
    ]
    cause = f"batch normalization without running statistics ({', '.join(own[:3])})" if own else ""
    coarse = any(
        tensor.is_floating_point() and tensor.element_size() < 4
        for tensors in (target.parameters(), target.buffers())
        for tensor in tensors
    )
    return batch_dependence(session.run, evaluation, cause, coarse)
