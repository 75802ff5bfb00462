"""Models with a fixed batch: measured at batch 1, or rejected at any other size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx, nn

from omgoptim.errors import ModelError
from omgoptim.measure.launch import LATENCY
from omgoptim.requests import ModelRequest, TrainingRequest
from omgoptim.runtimes.export import DYNAMIC_BATCH_FIX, first_sample
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from omgoptim.operations.loaded_model import LoadedModel

EXPORT_FREE = (
    "export it again with a dynamic batch: torch.export.export(…, dynamic_shapes=({0: torch.export.Dim('batch')},)); "
    f"where the model's code has the batch as a number, {DYNAMIC_BATCH_FIX}"
)


def stated_batch(module: nn.Module | None, signature: Signature | None, request: ModelRequest) -> int | None:
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
            EXPORT_FREE,
        )
    by_code = module is not None and not isinstance(module, fx.GraphModule)  # only its program has a batch of 1
    if size is not None and isinstance(request, TrainingRequest) and not by_code:
        raise ModelError(
            f"'{request.model}' accepts only batches of 1 and cannot be trained",
            "it was exported with 1 as the first dimension of its inputs",
            EXPORT_FREE,
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
        lowered: the engine wants it so, whatever the model's code does with the batch.
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
