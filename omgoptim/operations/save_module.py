"""Save a changed module as an artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.errors import OmgoptimError, RequestError
from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params
from omgoptim.models import artifact as artifacts
from omgoptim.models.manifest import PROGRAM, PROGRAM2, Manifest
from omgoptim.models.recipe import Recipe
from omgoptim.models.samples import as_tensors
from omgoptim.models.source import build
from omgoptim.models.structural_diff import compute_diff
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import one_sample
from omgoptim.operations.float_program import float_program, output_check
from omgoptim.operations.loaded_model import LoadedModel, recipe_of
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_pt2
from omgoptim.training.modes import on_device


def require_module(loaded: LoadedModel, verb: str) -> nn.Module:
    """Return the float module of the loaded model.

    Raises:
        RequestError: it is a program, or quantized.
    """
    if loaded.precision.startswith("int"):
        raise RequestError(
            f"{verb} cannot follow quantization",
            f"the model is in {loaded.precision}, and the layers of a quantized program are fixed",
            f"{verb} the float model that it was made from, then quantize the result",
        )
    if loaded.module is None:
        raise RequestError(
            f"{verb} changes a module, and the model was given as a program",
            "an ONNX file cannot be modified and trained",
            "give the module it was exported from: file.py:callable, with its weights as checkpoint",
        )
    if loaded.precision != "float32":
        raise RequestError(
            f"{verb} works on float32 weights",
            f"the model is in {loaded.precision}",
            f"{verb} the float32 model (model.float() where it is built), then quantize the result",
        )
    return loaded.module


def engine_for(runtime: str, loaded: LoadedModel) -> str:
    """Return the engine of the artifact; `auto` is the engine of the baseline."""
    return Manifest.read(loaded.baseline).runtime if runtime == "auto" else runtime


def save(
    module: nn.Module,
    loaded: LoadedModel,
    runtime: str,
    folder: Path,
    context: RunContext,
    *,
    to_time_only: bool = False,
) -> list[str]:
    """Save a changed module as an artifact for `runtime`: recipe, weights, ONNX file and .pt2 file.

    Args:
        module: the changed module, in eval mode.
        loaded: the original, or another model with its recipe.
        runtime: engine of the artifact.
        folder: of the artifact, written atomically.
        context: of the run.
        to_time_only: omit what timing does not need: the programs of other engines, the counts, and the recipe where
            the engine runs a program.

    Returns:
        Notes on programs that could not be exported.

    Raises:
        OmgoptimError: the module cannot be saved, exported for its runtime, or described as a change of its source.
    """
    notes: list[str] = []
    programs: list[Path] = []
    changed = replace(loaded, module=module, program=None)
    on_program = ENGINES[runtime].runs == "program"
    if on_program or not to_time_only:
        program = float_program(changed, context, "changed")
        if program.path is not None:
            programs.append(program.path)
        elif on_program:
            raise program.error or OmgoptimError("the changed model has no program")
        elif program.error is not None:
            notes.append(f"the artifact has no {PROGRAM}: {program.error.what}")
    target: Any = programs[0] if on_program else on_device(module, loaded.device)
    settings = SessionSettings(loaded.bench.threads, loaded.device)
    check = output_check(runtime, target, loaded.signature, settings, loaded.example)
    manifest = Manifest(runtime, "float32", loaded.signature, device=loaded.device)
    if to_time_only and on_program:
        artifacts.save_program(folder, programs[0], manifest, check)
        return notes
    recipe = recipe_of(loaded)
    as_pt2 = recipe.kind == "pt2"
    if as_pt2 or not to_time_only:
        path = context.work / "changed" / PROGRAM2
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            export_pt2(module, as_tensors(loaded.example, loaded.signature.dtypes), loaded.signature, path)
            programs += [] if as_pt2 else [path]
        except OmgoptimError as error:
            if as_pt2:
                raise
            notes.append(f"the artifact has no {PROGRAM2}: {error.what}")
        recipe = Recipe("pt2", str(path)) if as_pt2 else recipe
    if not as_pt2:
        base = replace(recipe, structural_diff=None)
        recipe = replace(base, structural_diff=compute_diff(build(base, loaded.policy), module))
    manifest = manifest if to_time_only else _counted(manifest, module, loaded)
    artifacts.save_module(folder, module, recipe, manifest, check, programs)
    return notes


def _counted(manifest: Manifest, module: nn.Module, loaded: LoadedModel) -> Manifest:
    """Return the manifest with parameters and multiply-accumulates of the changed module."""
    args, kwargs = one_sample(loaded)
    macs = count_macs(module, args, kwargs)
    params, nonzero = count_params(module)
    return replace(
        manifest,
        params=params,
        nonzero_params=nonzero,
        macs=macs.macs,
        macs_check=macs.check,
        lineage=loaded.lineage,
    )
