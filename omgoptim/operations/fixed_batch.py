"""Models whose batch cannot be free: measured and compared at batch 1, or refused where another one is fixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx, nn

from omgoptim.errors import ModelError
from omgoptim.measure.timing import LATENCY
from omgoptim.requests import ModelRequest, TrainingRequest
from omgoptim.runtimes.dynamic_batch import DYNAMIC_BATCH_FIX
from omgoptim.runtimes.export import first_sample
from omgoptim.runtimes.signature import Signature

if TYPE_CHECKING:
    from omgoptim.operations.loaded_model import LoadedModel

EXPORT_FREE = (
    "export it again with a free batch: torch.export.export(…, dynamic_shapes=({0: torch.export.Dim('batch')},)); "
    f"where the model's code has the batch as a number, {DYNAMIC_BATCH_FIX}"
)


def stated_batch(module: nn.Module | None, signature: Signature | None, request: ModelRequest) -> int | None:
    """Return the batch that an exported module or a program states for its inputs: 1, or None where it is free.

    Raises:
        ModelError: it is another number; or it is 1, and the verb trains.
    """
    size = signature.batch if signature is not None else None
    if size is None and isinstance(module, fx.GraphModule):
        size = _batch_of_placeholders(module)
    if size is not None and size != 1:
        raise ModelError(
            f"'{request.model}' takes batches of {size} samples only",
            f"it was exported with {size} as the first dimension of its inputs; latency is measured at batch 1",
            EXPORT_FREE,
        )
    if size is not None and isinstance(request, TrainingRequest):
        raise ModelError(
            f"'{request.model}' takes one sample at a time and cannot be trained",
            "it was exported with 1 as the first dimension of its inputs",
            EXPORT_FREE,
        )
    return size


def _batch_of_placeholders(module: fx.GraphModule) -> int | None:
    """The first dimension of the inputs of a module that torch.export made, where it is a number in all of them."""
    shapes = [
        tuple(node.meta["val"].shape)
        for node in module.graph.nodes
        if node.op == "placeholder" and hasattr(node.meta.get("val"), "shape")
    ]
    sizes = {shape[0] for shape in shapes if shape and isinstance(shape[0], int)}
    return sizes.pop() if len(sizes) == 1 and all(shape and isinstance(shape[0], int) for shape in shapes) else None


def at_batch_one(loaded: LoadedModel, reason: str, work: Path) -> LoadedModel:
    """The subject with all that is measured at batch 1: signature, example, samples, and no throughput.

    Args:
        reason: why the batch cannot be free.
        work: the folder for the evaluation samples, each as a batch of its own.
    """
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
        notes=[*loaded.notes, fixed_batch_note(reason)],
    )


def fixed_batch_note(reason: str) -> str:
    """What a report says of a batch that cannot be free."""
    return (
        f"{reason}; all is exported and measured at batch 1, and throughput not at all. To free it, {DYNAMIC_BATCH_FIX}"
    )
