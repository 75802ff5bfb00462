"""Export the model once, apply a technique, and save the candidate's artifact with its in-memory outputs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from omgoptim.errors import NoLayerChanged, OmgoptimError, TechniqueError
from omgoptim.models import artifact as artifacts
from omgoptim.models.manifest import LOWERED, PROGRAM, Manifest
from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import is_mixed_precision
from omgoptim.models.samples import Samples
from omgoptim.operations.context import RunContext
from omgoptim.operations.float_program import Program, output_check, run_in_process
from omgoptim.operations.loaded_model import LoadedModel, recipe_of
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.reports import Change, Skip
from omgoptim.requests import Params
from omgoptim.requests.quantize import Bf16, Dynamic, Fp16, Fp32, Qat, Static, WeightOnly
from omgoptim.runtimes import SessionSettings
from omgoptim.runtimes.export import first_sample, tied_weights
from omgoptim.runtimes.signature import BATCH
from omgoptim.techniques.registry import Outcome, ProgramRun, apply_to_program, technique_of

PRECISIONS: dict[type[Params], str] = {
    Static: "int8",
    Qat: "int8",
    Dynamic: "int8",
    Bf16: "bfloat16",
    Fp16: "float16",
    Fp32: "float32",
}
"""Precision recorded in an artifact by technique; OpenVINO computes in bfloat16 only where that is recorded."""


def precision_of(params: Params) -> str:
    """Return the precision of a technique's program; of weight_only it follows from the number of bits."""
    return f"int{params.num_bits}" if isinstance(params, WeightOnly) else PRECISIONS[type(params)]


@dataclass(frozen=True, slots=True)
class BuiltCandidate:
    """A candidate's saved artifact, or the error that prevented it."""

    spec: CandidateSpec
    folder: Path | None = None
    outcome: Outcome | None = None
    error: OmgoptimError | None = None

    @property
    def size_bytes(self) -> int | None:
        """Size of the saved artifact; None where there is none."""
        return Manifest.read(self.folder).size_bytes if self.folder else None


@dataclass(frozen=True, slots=True)
class CandidateBuilder:
    """Builder of the candidates of one model: applies the technique and saves the artifact."""

    context: RunContext
    loaded: LoadedModel
    """The original."""
    program: Program
    """Its float32 export."""
    calibration: Samples
    """Samples for the observers."""
    seed: int
    written: Mapping[str, Callable[[], BuiltCandidate]] = field(default_factory=dict)
    """Programs that workers write, by `CandidateSpec.key`; a call waits for it and raises its technique's error."""
    cache: Path | None = None
    """Folder of `ProgramRun.cache`, for this program with this calibration alone."""

    def build(
        self,
        spec: CandidateSpec,
        same_program: BuiltCandidate | None = None,
        *,
        doing: str = "",
        limit_s: float = math.inf,
    ) -> BuiltCandidate:
        """Build one candidate; a technique or engine that fails is recorded as its error.

        Args:
            spec: scheme, engine and settings of the candidate.
            same_program: the same technique built for another engine; its program is reused.
            doing: progress message; default: from the name of the spec.
            limit_s: seconds after which no further step begins.
        """
        loaded = self.loaded
        folder = self.context.work / "candidates" / spec.name.replace(" ", "_")
        scratch = folder.with_name(folder.name + ".scratch")
        began, doing = time.monotonic(), doing or f"building {spec.name}"

        def report_stage(stage: str, _done: float | None) -> None:
            refuse_beyond_limit(time.monotonic() - began, limit_s)
            self.context.progress(f"{doing}: {stage}", None)

        batches, threads = self.calibration.batches, loaded.bench.threads
        run = ProgramRun(batches, scratch, self.seed, threads, report_stage, self.cache)
        try:
            if spec.is_lowered:
                return BuiltCandidate(spec, folder, build_lowered(spec.params, folder, loaded, run, self.program.path))
            if spec.on_module:
                outcome = with_layers_that_never_ran(_build_module(spec, folder, loaded), loaded)
            else:
                written = same_program or (self.written[spec.key]() if spec.key in self.written else None)
                outcome = _build_program(spec, folder, loaded, self.program, run, written)
                if loaded.module is not None and same_program is None:
                    outcome = with_tied_weight_notes(outcome, loaded.module, precision_of(spec.params))
                    outcome = with_layers_that_never_ran(outcome, loaded)
            return BuiltCandidate(spec, folder, in_original_precision(outcome, loaded.precision))
        except OmgoptimError as error:
            return BuiltCandidate(spec, error=error)


def refuse_beyond_limit(seconds: float, limit_s: float) -> None:
    """Raise a TechniqueError where building one candidate exceeds its time limit."""
    if seconds > limit_s:
        raise TechniqueError(
            "building the candidate exceeded its time limit",
            f"stopped after {seconds:.0f} s; the limit for one of several candidates is {limit_s:.0f} s",
            "name its scheme and runtime: a single candidate has no limit",
        )


def in_original_precision(outcome: Outcome, precision: str) -> Outcome:
    """Express changes of a float32 copy in the precision of the original; drop layers stored as before."""
    if precision in ("float32", "int8", "int4", "int8_dynamic"):
        return outcome
    before = [
        change.model_copy(update={"before": precision}) if change.before == "float32" else change
        for change in outcome.changed
    ]
    return replace(outcome, changed=[c for c in before if c.after not in (precision, f"stored in {precision}")])


def with_tied_weight_notes(outcome: Outcome, module: nn.Module, precision: str) -> Outcome:
    """Note tied weights that a quantized program stores more than once, with the extra size."""
    if not precision.startswith("int"):
        return outcome
    bits = int(precision.removeprefix("int"))
    notes = []
    for names in tied_weights(module):
        owners = {name.rpartition(".")[0] for name in names}
        quantized = sum(change.path in owners for change in outcome.changed)
        in_float = any(skip.path in owners for skip in outcome.skipped)
        again = quantized - (not in_float)
        if again > 0:
            more = again * module.get_parameter(names[0]).numel() * bits / 8e6
            places = f"in float and in {precision}" if in_float else f"in {precision} for each layer that reads it"
            notes.append(f"The tied weight {names[0]} is stored {places}: {more:.3g} MB more.")
    return replace(outcome, notes=[*outcome.notes, *notes])


def with_layers_that_never_ran(outcome: Outcome, loaded: LoadedModel) -> Outcome:
    """List layers with weight matrices that are not named yet and did not run: no program has them."""
    ran = loaded.macs.by_path if loaded.macs else None
    if loaded.module is None or not ran or not outcome.changed:
        return outcome
    named = [change.path for change in outcome.changed] + [skip.path for skip in outcome.skipped]
    left = [
        Skip(path=path, reason="it is not called in a forward pass", kind="not_run")
        for path, layer in loaded.module.named_modules()
        if path
        and path not in ran
        and not isinstance(layer, nn.ParameterList | nn.ParameterDict)
        and any(parameter.ndim > 1 for parameter in layer.parameters(recurse=False))
        and not any(each == path or each.startswith(f"{path}.") or path.startswith(f"{each}.") for each in named)
    ]
    return replace(outcome, skipped=[*outcome.skipped, *left])


def _build_program(
    spec: CandidateSpec,
    folder: Path,
    loaded: LoadedModel,
    program: Program,
    run: ProgramRun,
    same_program: BuiltCandidate | None,
) -> Outcome:
    if program.path is None:
        raise program.error or TechniqueError("the model has no program")
    if same_program is not None and same_program.folder is not None and same_program.outcome is not None:
        target, outcome = same_program.folder / PROGRAM, same_program.outcome
    else:
        run.scratch.mkdir(parents=True, exist_ok=True)
        target = run.scratch / PROGRAM
        outcome = apply_to_program(program.path, target, spec.params, run)
    mixed = is_mixed_precision(load(target, weights=False))
    manifest = replace(_manifest(spec, loaded, precision_of(spec.params)), mixed_precision=mixed)
    settings = SessionSettings(loaded.bench.threads, loaded.device, manifest.precision, mixed)
    check = output_check(spec.runtime, target, loaded.signature, settings, loaded.example)
    artifacts.save_program(folder, target, manifest, check)
    return outcome


def build_lowered(
    params: Params, folder: Path, loaded: LoadedModel, run: ProgramRun, program: Path | None = None
) -> Outcome:
    """Lower the model, loaded at batch 1, to an ExecuTorch program and save it as an artifact.

    `program` is its float ONNX program, which static quantization takes improved weights from.

    Raises:
        OmgoptimError: it cannot be lowered or run, or no layer was quantized.
    """
    from omgoptim.measure.size import module_layers
    from omgoptim.techniques.quantize._executorch.lowering import LoweringInput, lower

    if loaded.module is None:
        raise TechniqueError(
            "the model is a program, and ExecuTorch starts from a module",
            "an ONNX file cannot be lowered",
            "give the module it was exported from: file.py:callable, with its weights as checkpoint",
        )
    run.scratch.mkdir(parents=True, exist_ok=True)
    target = run.scratch / LOWERED
    layers = {layer.path: layer.op for layer in module_layers(loaded.module)}
    example = first_sample(loaded.example)
    outcome = lower(LoweringInput(loaded.module, loaded.signature, example, run, layers, program), params, target)
    manifest = _manifest(CandidateSpec(params, "executorch"), loaded, precision_of(params))
    settings = SessionSettings(loaded.bench.threads)
    check = output_check("executorch", target, loaded.signature, settings, example)
    artifacts.save_program(folder, target, manifest, check)
    return outcome


def _build_module(spec: CandidateSpec, folder: Path, loaded: LoadedModel) -> Outcome:
    from omgoptim.runtimes.torch_precision import convert

    if loaded.module is None:
        raise TechniqueError("the model is a program, and torch runs modules")
    precision = technique_of(spec.params).torch_precision or "float32"
    float_module = copy.deepcopy(loaded.module)
    module = run_in_process(lambda: convert(float_module, precision))
    outcome = _module_outcome(module, precision)
    manifest = _manifest(spec, loaded, precision)
    settings = SessionSettings(loaded.bench.threads, loaded.device, precision)
    # The check is what the module gives eagerly: compiling it here as well would only repeat long work.
    check = output_check("torch_eager", module.to(loaded.device), loaded.signature, settings, loaded.example)
    artifacts.save_module(folder, module.cpu(), recipe_of(loaded), manifest, check)
    return outcome


def _module_outcome(module: nn.Module, precision: str) -> Outcome:
    from omgoptim.runtimes.torch_precision import converted_layers

    if precision == "float32":
        return Outcome([])
    if precision == "int8_dynamic":
        changed = [
            Change(path=path, what="dynamic int8", before=kind, after="int8") for path, kind in converted_layers(module)
        ]
        if not changed:
            raise NoLayerChanged(
                "dynamic quantization found no layer to change",
                "the model has no Linear, LSTM or GRU module",
                "for convolutions: scheme static with data",
                schemes=["static"],
            )
        done = {change.path for change in changed}
        left = [
            Skip(path=path, reason=f"torch has no dynamic int8 {type(layer).__name__}", kind="unsupported")
            for path, layer in module.named_modules()
            if path not in done and "weight" in layer._parameters
        ]
        return Outcome(changed, left)
    return Outcome(
        [
            Change(path=path, what=f"weights in {precision}", before="float32", after=precision)
            for path, layer in module.named_modules()
            if any(parameter.is_floating_point() for parameter in layer.parameters(recurse=False))
        ]
    )


def _manifest(spec: CandidateSpec, loaded: LoadedModel, precision: str) -> Manifest:
    baseline = Manifest.read(loaded.baseline)
    return replace(
        baseline,
        runtime=spec.runtime,
        precision=precision,
        signature=loaded.signature.at_batch(baseline.signature.batch or BATCH) if spec.on_module else loaded.signature,
        lineage=loaded.lineage,
        device=loaded.device,
        files={},
    )
