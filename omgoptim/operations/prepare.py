"""Preparation of every verb: load the model and its data, run it once, save the baseline artifact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from omgoptim.errors import DataError, ModelError, SetupError, argument
from omgoptim.hardware import usable_cores
from omgoptim.measure.macs import MacsCount, count_macs
from omgoptim.measure.measuring_process import TimingSetup
from omgoptim.measure.program_macs import count_program
from omgoptim.measure.size import count_params
from omgoptim.measure.validity_checks import missing_classes_notes
from omgoptim.models import artifact as artifacts
from omgoptim.models.data import DataSource, adjacent_loader, from_callable, open_data, random_data
from omgoptim.models.forward import NamedBatch
from omgoptim.models.manifest import LOWERED, PROGRAM, Manifest
from omgoptim.models.onnx_file import declared_signature
from omgoptim.models.onnx_graph import count_params as count_program_params
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.raw_batch import Collation
from omgoptim.models.samples import forward_args, repeat_to_size
from omgoptim.models.security.file_integrity import can_sign
from omgoptim.models.security.hub_options import allow_remote_code
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import Source, default_inputs, load_source
from omgoptim.operations.context import RunContext
from omgoptim.operations.first_forward import (
    RANDOM_SAMPLES,
    FirstRun,
    count_notes,
    deterministic_outputs,
    first_run,
    float32_copy,
    float32_signature,
    precision_of_module,
    refuse_fixed_casts,
)
from omgoptim.operations.loaded_model import InMemoryModel, Live, LoadedModel, at_batch_one, recipe_of_live
from omgoptim.operations.reference_outputs import outputs_of
from omgoptim.operations.timing import timing_setup
from omgoptim.requests import ModelRequest, QuantizeRequest, TrainingRequest
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import first_sample
from omgoptim.runtimes.signature import Signature
from omgoptim.runtimes.torch_precision import HALF


def prepare(request: ModelRequest, context: RunContext, live: Live | None = None) -> LoadedModel:
    """Load the model and its data, run it once, and save the unchanged model as the baseline artifact.

    Raises:
        OmgoptimError: of the kind that fits: see `errors.py`.
    """
    live, threads = live or Live(), _use_settings(request)
    policy = PathPolicy.of_request(context.project, request)
    context.progress("loading the model", 0.01)
    source = _load(request, policy, live)
    opened = _open_model(source, policy)
    device = _device(request, opened)
    context.progress("loading the data", 0.03)
    data = _data(request, policy, live, source, opened)
    first = first_run(request, opened, live.resplit(data) if live.resplit else data, threads, context)
    metric = live.metric or request.metric
    outputs = outputs_of(request, metric, opened.target, first.signature, first.data, first.evaluation)
    macs, params = _counts(opened, first.signature, repeat_to_size(first.evaluation, 1))
    precision, precision_notes = _precision(source, opened, first)
    notes = [*first.notes, *missing_classes_notes(outputs, first.evaluation.targets), *precision_notes]
    first = first if opened.module is None else first.in_float32()
    evaluation = first.evaluation.one_by_one() if first.dependent else first.evaluation
    fixed = f"'{request.model}' was exported for a batch of 1" if first.declared_batch else None
    baseline = source.artifact or context.work / "baseline"
    if source.artifact is None:
        manifest = _manifest(opened, first.signature, precision, device, macs, params)
        fixed = _save_baseline(baseline, source, opened, manifest, first.example, threads) or fixed
    saved, signature = Manifest.read(baseline), first.signature
    if opened.module is not None and precision != "float32":
        opened, signature = replace(opened, module=float32_copy(opened.module)), float32_signature(signature)
        if isinstance(request, QuantizeRequest):  # which exports the copy
            refuse_fixed_casts(opened, signature, first.example, precision)
    loaded = LoadedModel(
        source=source,
        module=opened.module,
        program=opened.program,
        signature=signature,
        data=first.data,
        evaluation=evaluation,
        example=first.example,
        baseline=baseline,
        bench=_bench(request, context, first, device, policy, threads),
        macs=macs,
        params=params,
        precision=saved.precision,
        lineage=(*saved.lineage, context.run_id),
        policy=policy,
        device=device,
        metric=metric,
        eval_folder=evaluation.write(context.work / "eval"),
        outputs=outputs,
        notes=[*source.notes, *first.data.notes, *notes, *count_notes(macs), *_unsigned_warnings(request)],
        batch_dependent=first.dependent,
    )
    return at_batch_one(loaded, fixed, context.work) if fixed else loaded


def _bench(
    request: ModelRequest, context: RunContext, first: FirstRun, device: str, policy: PathPolicy, threads: int
) -> TimingSetup:
    """Return the timing settings: of the target's cores, and without throughput where outputs depend on the batch."""
    threads = request.threads or (context.target.machine.cores if context.target else threads)
    return timing_setup(context, first.evaluation, None if first.dependent else request.batch, threads, device, policy)


def _device(request: ModelRequest, opened: InMemoryModel) -> str:
    """Return the device of the run.

    Raises:
        SetupError: it cannot be used.
    """
    device = "cpu" if request.device == "auto" else request.device
    unusable = ENGINES["onnxruntime" if opened.program else "torch_eager"].missing(device)
    if unusable:
        raise SetupError(f"device {device} cannot be used", unusable, "leave device out to measure on the CPU")
    return device


def _load(request: ModelRequest, policy: PathPolicy, live: Live) -> Source:
    if live.module is not None:
        return Source(module=live.module, notes=list(live.notes))
    return load_source(
        request.model,
        policy,
        checkpoint=request.checkpoint,
        weights=request.weights,
        kwargs=request.model_kwargs,
        limit_s=request.time_limit_s,
    )


def _open_model(source: Source, policy: PathPolicy) -> InMemoryModel:
    if source.artifact is not None:  # its files were verified when it was found
        manifest = Manifest.read(source.artifact)
        if artifacts.has_module(manifest, policy):  # a program may lie beside it: the module can do more
            module = artifacts.load_module(source.artifact, manifest, policy)
            # Fresh processes run it in half precision; this process exports and converts it from float32.
            return InMemoryModel(module.float() if manifest.precision in HALF else module, None, manifest.signature)
        if ENGINES[manifest.runtime].runs == "lowered":
            raise ModelError(
                f"an artifact for {manifest.runtime} cannot be loaded as a model",
                f"{LOWERED} holds no module and no ONNX program",
                "give the model that it was made from; the command compare measures such artifacts",
            )
        return InMemoryModel(None, source.artifact / PROGRAM, manifest.signature)
    if source.program is not None:
        return InMemoryModel(None, source.program, declared_signature(source.program))
    return InMemoryModel(source.module, None, None)


def _data(request: ModelRequest, policy: PathPolicy, live: Live, source: Source, opened: InMemoryModel) -> DataSource:
    ranks = [len(tensor.shape) for tensor in opened.signature.inputs] if opened.signature else []
    collation = Collation(opened.module, ranks)
    if live.data is not None:
        return from_callable(live.data, request.batch, request.time_limit_s, collation)
    if request.data:
        return open_data(request.data, policy, request.batch, request.time_limit_s, request.seed, collation)
    specs = request.inputs or default_inputs(source.recipe, opened.module) or _stated_inputs(opened.signature)
    if not specs:
        compresses = isinstance(request, (TrainingRequest, QuantizeRequest))  # what measures runs only named code
        beside = adjacent_loader(source.recipe, policy, request.time_limit_s) if compresses else None
        if beside is not None:
            name, load = beside
            collation.note(f"no data was given: using {name}, found beside the model")
            return from_callable(load, request.batch, request.time_limit_s, collation)
        raise DataError(
            "the inputs of the model are unknown",
            "neither data nor input shapes were given",
            f"give {argument('data', 'file.py:callable')}, or shapes such as {argument('inputs', ['1x3x224x224'])}",
        )
    return random_data(specs, opened.module, RANDOM_SAMPLES, request.seed)


def _stated_inputs(signature: Signature | None) -> list[str]:
    """Return the input shapes of a program or artifact, unless a dimension other than the batch is dynamic."""
    if signature is None or any(isinstance(size, str) for tensor in signature.inputs for size in tensor.shape[1:]):
        return []
    return [f"{t.name}:{t.dtype}:{'x'.join(map(str, (1, *t.shape[1:])))}" for t in signature.inputs]


def _counts(
    opened: InMemoryModel, signature: Signature, one: NamedBatch
) -> tuple[MacsCount | None, tuple[int, int] | None]:
    if opened.module is None:
        if opened.program is None:
            return None, None
        return MacsCount(count_program(opened.program, one).macs, None, {}), count_program_params(opened.program)
    args, kwargs = forward_args(signature, one)
    return count_macs(opened.module, args, kwargs), count_params(opened.module)


def _use_settings(request: ModelRequest) -> int:
    """Set seed, permission and threads of this process; return the number of threads."""
    torch.manual_seed(request.seed)
    allow_remote_code(request.allow_remote_code)
    threads = request.threads or usable_cores()
    torch.set_num_threads(threads)
    return threads


def _precision(source: Source, opened: InMemoryModel, first: FirstRun) -> tuple[str, list[str]]:
    """Return the precision of a model that is no artifact, and notes on one other than float32."""
    if opened.module is None or source.artifact is not None:
        return "float32", []
    return precision_of_module(opened.module, first.inputs)


def _manifest(
    opened: InMemoryModel,
    signature: Signature,
    precision: str,
    device: str,
    macs: MacsCount | None,
    params: tuple[int, int] | None,
) -> Manifest:
    return Manifest(
        runtime="onnxruntime" if opened.program else "torch_eager",
        precision=precision,
        signature=signature,
        params=params[0] if params else None,
        nonzero_params=params[1] if params else None,
        macs=macs.macs if macs else None,
        macs_check=macs.check if macs else None,
        device=device,
    )


def _save_baseline(
    folder: Path, source: Source, opened: InMemoryModel, manifest: Manifest, example: NamedBatch, threads: int
) -> str | None:
    """Save the untouched model; return why a live module could only be exported at batch 1, if so."""
    settings = SessionSettings(threads, manifest.device)
    session = ENGINES[manifest.runtime].open(opened.target, manifest.signature, settings)

    def recorded(batch: NamedBatch) -> OutputCheck:
        if opened.module is not None:  # a GPU rounds in its own way: the record is of the device
            opened.module.to(manifest.device)
        check = OutputCheck(batch, deterministic_outputs(session, batch))
        if opened.module is not None:
            opened.module.cpu()
        return check

    check = recorded(example)
    if opened.program is not None:
        artifacts.save_program(folder, opened.program, manifest, check)
        return None
    if opened.module is None:
        raise ModelError("there is no model to save")
    recipe, fixed = source.recipe, None
    if recipe is None:
        recipe, fixed = recipe_of_live(opened.module, manifest.signature, example, folder.with_name("live.pt2"))
    if fixed:
        manifest = replace(manifest, signature=manifest.signature.at_batch(1))
        check = recorded(first_sample(example))
    artifacts.save_module(folder, opened.module, recipe, manifest, check)
    return fixed


def _unsigned_warnings(request: ModelRequest) -> list[str]:
    """Return a warning where the artifact cannot be signed with this user's key."""
    if "output" not in type(request).model_fields or can_sign():
        return []
    return [
        "the state folder cannot be written, so the artifact is not signed with your key: if it holds a recipe, "
        f"opening it later requires {argument('trust_artifact', True)} (OMGOPTIM_STATE_DIR names another folder)"
    ]
