"""The untouched model as an artifact on an engine: what a result is measured against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from omgoptim.errors import ModelError, RequestError, SetupError
from omgoptim.models import artifact as artifacts
from omgoptim.models.artifact import Check, Manifest
from omgoptim.operations.candidates import Program
from omgoptim.operations.context import RunContext
from omgoptim.operations.making import float_program, in_memory
from omgoptim.operations.subject import Subject, recipe_of
from omgoptim.runtimes import ENGINES, Settings


def baseline_on(runtime: str, subject: Subject, context: RunContext, program: Program | None = None) -> Path:
    """The untouched model as an artifact: as it came (`auto`), or its float form on the engine that was asked for.

    Args:
        program: the model's export, where there is one already.

    Raises:
        SetupError: this Python cannot use the engine.
        RequestError, ModelError: the model does not run on it.
    """
    manifest = Manifest.read(subject.baseline)
    if runtime in ("auto", manifest.runtime):
        return subject.baseline
    reason = ENGINES[runtime].missing(subject.device)
    if reason:
        raise SetupError(f"runtime {runtime} cannot be used", reason, "omgoptim doctor lists what can")
    folder = context.work / runtime
    if folder.is_dir():  # made before, in this run: an artifact appears whole or not at all
        return folder
    other = replace(manifest, runtime=runtime, files={})
    settings = Settings(subject.bench.threads, subject.device, manifest.precision)
    if manifest.precision != "float32" and subject.module is not None:
        raise RequestError(
            f"an artifact in {manifest.precision} runs on the engine that it was made for",
            f"it was made for {manifest.runtime}",
            "leave the runtime out, or profile the float model on that engine",
        )
    if ENGINES[runtime].runs == "module":
        if subject.module is None:
            raise ModelError("a program does not run on torch", "the model was given as ONNX", "use onnxruntime")
        module = subject.module
        outputs = in_memory(
            lambda: ENGINES["torch_eager"].open(module, subject.signature, settings).run(subject.example)
        )
        artifacts.save_module(folder, subject.module, recipe_of(subject), other, Check(subject.example, outputs))
        return folder
    program = program or float_program(subject, context)
    if program.path is None:
        raise program.error or ModelError("the model has no program")
    path, engine = program.path, ENGINES[runtime]
    outputs = in_memory(lambda: engine.open(path, subject.signature, settings).run(subject.example))
    artifacts.save_program(folder, path, other, Check(subject.example, outputs))
    return folder
