"""Baseline artifacts: the unchanged model on an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from omgoptim.errors import ModelError, RequestError, SetupError
from omgoptim.models import artifact as artifacts
from omgoptim.models.manifest import Manifest
from omgoptim.operations.context import RunContext
from omgoptim.operations.float_program import Program, float_program, output_check
from omgoptim.operations.loaded_model import LoadedModel, at_batch_one, recipe_of
from omgoptim.operations.quantization.build_candidates import build_lowered
from omgoptim.requests.quantize import Fp32
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.techniques.registry import ProgramRun


def at_exportable_batch(runtime: str, loaded: LoadedModel, context: RunContext) -> LoadedModel:
    """Return the model at batch 1 where the engine runs programs and the model's code fixes the batch of the export."""
    if ENGINES[runtime].runs == "module" or loaded.module is None or loaded.fixed_batch is not None:
        return loaded
    program = float_program(loaded, context, or_at_one=True)
    return loaded if program.fixed_batch is None else at_batch_one(loaded, program.fixed_batch, context.work)


def baseline_on(runtime: str, loaded: LoadedModel, context: RunContext, program: Program | None = None) -> Path:
    """Return the unchanged model as an artifact: as loaded (`auto`), or its float form on another engine.

    Args:
        runtime: `auto`, or the name of an engine.
        loaded: the original.
        context: of the run.
        program: the model's export, if it exists already.

    Raises:
        SetupError: this Python cannot use the engine.
        RequestError, ModelError: the model does not run on it.
    """
    manifest = Manifest.read(loaded.baseline)
    if runtime in ("auto", manifest.runtime):
        return loaded.baseline
    reason = ENGINES[runtime].missing(loaded.device)
    if reason:
        raise SetupError(f"runtime {runtime} cannot be used", reason, "omgoptim doctor lists what can")
    folder = context.work / runtime
    if folder.is_dir():  # built earlier in this run: artifacts are written atomically
        return folder
    other = replace(manifest, runtime=runtime, files={})
    settings = SessionSettings(loaded.bench.threads, loaded.device, manifest.precision)
    if manifest.precision != "float32" and loaded.module is not None:
        raise RequestError(
            f"an artifact in {manifest.precision} runs only on its own engine",
            f"its engine is {manifest.runtime}",
            "leave the runtime out, or profile the float model on that engine",
        )
    if ENGINES[runtime].runs == "module":
        if loaded.module is None:
            raise ModelError("an ONNX program does not run on torch", "the model was given as ONNX", "use onnxruntime")
        check = output_check("torch_eager", loaded.module, loaded.signature, settings, loaded.example)
        artifacts.save_module(folder, loaded.module, recipe_of(loaded), other, check)
        return folder
    if ENGINES[runtime].runs == "lowered":
        build_lowered(Fp32(), folder, loaded, ProgramRun([], context.work / f"{runtime}.scratch"))
        return folder
    program = program or float_program(loaded, context)
    if program.path is None:
        raise program.error or ModelError("the model has no ONNX program")
    check = output_check(runtime, program.path, loaded.signature, settings, loaded.example)
    artifacts.save_program(folder, program.path, other, check)
    return folder


def original_on_target(loaded: LoadedModel, context: RunContext, program: Program | None = None) -> LoadedModel:
    """Return the model with its original as a float32 program: the baseline of everything that is measured on a target.

    Raises:
        ModelError: it has none.
    """
    if context.target is None or ENGINES[Manifest.read(loaded.baseline).runtime].runs == "program":
        return loaded
    if program is not None and program.error is not None:
        raise ModelError(
            "the model cannot be measured on a target",
            f"only programs run there, and {program.error.reason}",
            program.error.fix,
        )
    return replace(loaded, baseline=baseline_on("onnxruntime", loaded, context, program))
