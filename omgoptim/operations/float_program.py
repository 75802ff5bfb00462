"""Float export of the model: one ONNX program, checked against its module, that everything on an engine starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from omgoptim.errors import OmgoptimError, TechniqueError, argument
from omgoptim.models.forward import NamedBatch
from omgoptim.models.manifest import PROGRAM
from omgoptim.models.onnx_graph import GraphTraits, graph_traits
from omgoptim.models.output_check import TOLERANCE, OutputCheck, max_difference
from omgoptim.models.samples import as_tensors, forward_args, repeat_to_size
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.requests import QuantizeRequest
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.engine import engine_message
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import Signature

T = TypeVar("T")

UNROLLED_CALLS = 16
"""Calls of one layer per forward pass that count as a loop; shared heads and blocks have fewer. Chosen; only a warning
depends on it."""


@dataclass(frozen=True, slots=True)
class Program:
    """Float export that all program candidates start from, or the error that prevented it."""

    path: Path | None
    traits: GraphTraits | None
    error: OmgoptimError | None = None
    fixed_batch: str | None = None
    """Reason for a fixed batch of 1, where torch.export could not make it dynamic."""


def float_program(loaded: LoadedModel, context: RunContext, name: str = "float", *, or_at_one: bool = False) -> Program:
    """Export the model as a float32 ONNX file and check it against its module.

    Args:
        loaded: the original.
        context: of the run.
        name: of the folder that it is put in.
        or_at_one: export at batch 1 where the batch cannot be dynamic; the caller then uses `at_batch_one`.
    """
    if loaded.program is not None:
        return Program(loaded.program, graph_traits(loaded.program))
    if loaded.module is None:
        raise TechniqueError("there is neither a module nor a program")
    path = context.work / name / PROGRAM
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        example = as_tensors(loaded.example, loaded.signature.dtypes)
        fixed = export_onnx(loaded.module, example, loaded.signature, path, or_at_one=or_at_one)
        _check_export(loaded, path)
    except OmgoptimError as error:
        return Program(None, None, error)
    return Program(path, graph_traits(path), fixed_batch=fixed)


def _check_export(loaded: LoadedModel, path: Path) -> None:
    """Compare program and module on one real sample, a batch size other than that of the export."""
    settings = SessionSettings(threads=loaded.bench.threads)
    one = {name: array[:1] for name, array in loaded.evaluation.batches[0].items()}
    expected = ENGINES["torch_eager"].open(loaded.module, loaded.signature, settings).run(one)
    try:
        actual = ENGINES["onnxruntime"].open(path, loaded.signature, settings).run(one)
    except Exception as error:  # ONNX Runtime's errors have no common base
        fix = "torch's exporter wrote it so: other operations in the forward may help; torch runtimes still work"
        raise TechniqueError("ONNX Runtime cannot run the exported model", engine_message(error), fix) from error
    worst = max_difference(expected, actual)
    if not worst <= TOLERANCE["float32"]:
        raise TechniqueError(
            "the outputs of the exported model differ from the module's",
            f"the maximum difference on one sample is {worst:.3g} of the outputs' scale",
            "the forward pass likely branches on values or keeps state; torch runtimes still work",
        )


def run_in_process(action: Callable[[], T]) -> T:
    """Run an engine in this process and convert its exceptions to a TechniqueError."""
    try:
        return action()
    except OmgoptimError:
        raise
    except Exception as error:  # engines raise kinds of their own without a common base
        why = f"{type(error).__name__}: {engine_message(error)}"
        raise TechniqueError("the engine cannot run the model", why) from error


def output_check(
    runtime: str, target: Any, signature: Signature, settings: SessionSettings, example: NamedBatch
) -> OutputCheck:
    """Run a module or program on an engine in this process, as the record that its saved artifact is checked against.

    Raises:
        OmgoptimError: the engine cannot run it.
    """
    outputs = run_in_process(lambda: ENGINES[runtime].open(target, signature, settings).run(example))
    return OutputCheck(example, outputs)


def unrolled_note(loaded: LoadedModel, request: QuantizeRequest) -> str | None:
    """Return a note on a layer called in a loop, its cost and alternatives; None where there is none."""
    if loaded.module is None:
        return None
    counts = layer_calls(loaded.module, loaded)
    path, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if most < UNROLLED_CALLS:
        return None
    layer = loaded.module.get_submodule(path)
    library = {nn.LSTMCell: "nn.LSTM", nn.GRUCell: "nn.GRU", nn.RNNCell: "nn.RNN"}.get(type(layer))
    library_note = f"; {library} over the whole sequence is exported as one operator" if library else ""
    dynamic = f"; cheaper, without calibration: the same call with {argument('scheme', 'dynamic')}"
    cheaper = "" if request.scheme.scheme == "dynamic" else dynamic
    total = sum(counts.values())
    return (
        f"'{path}' ({type(layer).__name__}) is called {most} times in one forward pass: the export unrolls it into "
        f"{total:,} layer calls for {len(counts)} layers, so that export, calibration and conversion of each candidate "
        f"take about {total / len(counts):.0f} times as long as for the layers alone{library_note}{cheaper}"
    )


def layer_calls(module: nn.Module, loaded: LoadedModel) -> dict[str, int]:
    """Count the calls of each layer with parameters in one forward pass on one sample."""
    counts: dict[str, int] = {}

    def count(path: str) -> None:
        counts[path] = counts.get(path, 0) + 1

    hooks = [
        layer.register_forward_pre_hook(lambda _module, _args, path=path: count(path))
        for path, layer in module.named_modules()
        if layer._parameters and path
    ]
    args, kwargs = forward_args(loaded.signature, repeat_to_size(loaded.evaluation, 1))
    try:
        with torch.inference_mode():
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return counts
