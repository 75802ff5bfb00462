"""Loading for every verb: the model, its data and signature, and its baseline artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omgoptim.errors import DataError, ModelError, SetupError, argument
from omgoptim.hardware import usable_cores
from omgoptim.measure.macs import MacsCount, count_macs
from omgoptim.measure.program_macs import count_program
from omgoptim.measure.size import count_params
from omgoptim.measure.timing import TimingSetup
from omgoptim.models import artifact as artifacts
from omgoptim.models.artifact import Manifest, OutputCheck
from omgoptim.models.causal_lm import shifted
from omgoptim.models.collate import Collation
from omgoptim.models.data import DataSource, Split, adjacent_loader, from_callable, open_data, random_data, take_samples
from omgoptim.models.forward import NamedBatch, first_forward, input_tensors, name_inputs
from omgoptim.models.onnx_graph import count_params as count_program_params
from omgoptim.models.onnx_signature import declared_signature
from omgoptim.models.outputs import ModelOutputs
from omgoptim.models.samples import Samples, as_tensors, forward_args, named_samples, repeat_to_size, synthetic_like
from omgoptim.models.security.hub_options import allow_remote_code
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.security.user_code import call_user
from omgoptim.models.source import Recipe, Source, default_inputs, load_source
from omgoptim.operations.context import RunContext
from omgoptim.operations.first_forward import (
    batch_dependence_of,
    count_notes,
    float32_arrays,
    float32_copy,
    float32_signature,
    is_causal,
    precision_of_module,
    refuse_nan_samples,
    refuse_other_inputs,
    settled_outputs,
    with_shifted_labels,
)
from omgoptim.operations.fixed_batch import at_batch_one, stated_batch
from omgoptim.operations.live_objects import Live as Live
from omgoptim.operations.live_objects import recipe_of_live
from omgoptim.operations.output_folder import not_sealed
from omgoptim.operations.reference_outputs import outputs_of
from omgoptim.operations.timing import bench_of
from omgoptim.requests import ModelRequest, QuantizeRequest, TrainingRequest
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.engine import as_float32
from omgoptim.runtimes.export import first_sample
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.runtimes.torch_precision import HALF


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

    def samples(self, split: Split, count: int) -> Samples:
        """Return the first `count` samples of a split, with the model's input names.

        Selection samples are batches of 1 where the output depends on the batch; training samples are not.
        """
        raw = take_samples(self.data.batches(split), count)
        named = [name_inputs(self.module, item.inputs, self.signature.input_names) for item in raw]
        samples = named_samples(named, raw)
        if self.module is not None:
            samples = float32_arrays(samples)
        one_by_one = self.batch_dependent or self.fixed_batch
        return samples.one_by_one() if one_by_one and split != "train" else samples


def prepare(request: ModelRequest, context: RunContext, live: Live | None = None) -> LoadedModel:
    """Load the model and its data, run it once, and save the unchanged model as the baseline artifact.

    Raises:
        OmgoptimError: of the kind that fits: see `errors.py`.
    """
    live = live or Live()
    torch.manual_seed(request.seed)
    allow_remote_code(request.allow_remote_code)
    policy = PathPolicy.of_request(context.project, request)
    context.progress("loading the model", 0.01)
    source = _load(request, policy, live)
    threads = request.threads or usable_cores()
    torch.set_num_threads(threads)
    device = "cpu" if request.device == "auto" else request.device
    opened = _open_model(source, policy)
    unusable = ENGINES["onnxruntime" if opened.program else "torch_eager"].missing(device)
    if unusable:
        raise SetupError(f"device {device} cannot be used", unusable, "leave device out to measure on the CPU")
    context.progress("loading the data", 0.03)
    data = _data(request, policy, live, source, opened)
    data = live.resplit(data) if live.resplit else data
    raw = data.evaluation(request.samples if data.real else 64)
    named = [name_inputs(opened.module, item.inputs, opened.input_names) for item in raw]
    evaluation = named_samples(named, raw)
    stated = stated_batch(opened.module, opened.signature, request)
    evaluation = evaluation.one_by_one() if stated else evaluation
    context.progress("running the model once", 0.05)
    inputs = input_tensors(named)
    if opened.program and opened.signature:
        refuse_other_inputs(inputs, opened.signature)
    refuse_nan_samples(opened.module, inputs, evaluation, request.time_limit_s)
    example, signature, notes = _example_and_signature(opened, inputs, evaluation, request, stated or 2)
    if is_causal(opened.module or opened.program, signature, evaluation, request.time_limit_s):
        notes = [*notes, "the labels repeat the inputs: each position is scored on the next token"]
        data = with_shifted_labels(data, opened.module)
        evaluation = Samples(evaluation.batches, [shifted(target) for target in evaluation.targets])
    dependent = batch_dependence_of(opened.module, opened.program, signature, evaluation, threads)
    if dependent:
        notes.append(f"{dependent}; quality is measured one sample at a time, and throughput not at all")
    metric = live.metric or request.metric
    outputs = outputs_of(request, metric, opened.module, opened.program, signature, data, evaluation, threads)
    macs, params = _counts(opened, signature, repeat_to_size(evaluation, 1))
    precision = "float32"
    if opened.module is not None and source.artifact is None:
        precision, said = precision_of_module(opened.module, inputs)
        notes = [*notes, *said]
    if opened.module is not None:
        evaluation = float32_arrays(evaluation)
        example = {name: as_float32(array) for name, array in example.items()}
    timed = request.threads or (context.target.machine.cores if context.target else threads)
    bench = bench_of(context, evaluation, None if dependent else request.batch, timed, device, policy)
    evaluation = evaluation.one_by_one() if dependent else evaluation
    baseline, fixed = source.artifact, f"'{request.model}' was exported for a batch of 1" if stated else None
    if baseline is None:
        baseline = context.work / "baseline"
        manifest = Manifest(
            runtime="onnxruntime" if opened.program else "torch_eager",
            precision=precision,
            signature=signature,
            params=params[0] if params else None,
            nonzero_params=params[1] if params else None,
            macs=macs.macs if macs else None,
            macs_check=macs.check if macs else None,
            device=device,
        )
        fixed = _save_baseline(baseline, source, opened, manifest, example, threads, context.work) or fixed
    if opened.module is not None and precision != "float32":
        opened, signature = replace(opened, module=float32_copy(opened.module)), float32_signature(signature)
    made = Manifest.read(baseline)
    loaded = LoadedModel(
        source=source,
        module=opened.module,
        program=opened.program,
        signature=signature,
        data=data,
        evaluation=evaluation,
        example=example,
        baseline=baseline,
        bench=bench,
        macs=macs,
        params=params,
        precision=made.precision,
        lineage=(*made.lineage, context.run_id),
        policy=policy,
        device=device,
        metric=metric,
        eval_folder=evaluation.write(context.work / "eval"),
        outputs=outputs,
        notes=[*source.notes, *data.notes, *notes, *count_notes(macs), *not_sealed(request)],
        batch_dependent=dependent,
    )
    return at_batch_one(loaded, fixed, context.work) if fixed else loaded


@dataclass(frozen=True, slots=True)
class _OpenedModel:
    """The model in this process: a module, or a program with its signature."""

    module: nn.Module | None
    program: Path | None
    signature: Signature | None

    @property
    def input_names(self) -> list[str]:
        return self.signature.input_names if self.signature else []


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


def _open_model(source: Source, policy: PathPolicy) -> _OpenedModel:
    if source.artifact is not None:  # its files were verified when it was found
        manifest = Manifest.read(source.artifact)
        if artifacts.has_module(manifest, policy):  # a program may lie beside it: the module can do more
            module = artifacts.load_module(source.artifact, manifest, policy)
            # Fresh processes run it in half precision; this process exports and converts it from float32.
            return _OpenedModel(module.float() if manifest.precision in HALF else module, None, manifest.signature)
        if ENGINES[manifest.runtime].runs == "lowered":
            raise ModelError(
                f"an artifact for {manifest.runtime} is the end of a chain",
                f"{artifacts.LOWERED} holds no module and no ONNX program",
                "give the model that it was made from; compare measures two artifacts, also of this kind",
            )
        return _OpenedModel(None, source.artifact / artifacts.PROGRAM, manifest.signature)
    if source.program is not None:
        return _OpenedModel(None, source.program, declared_signature(source.program))
    return _OpenedModel(source.module, None, None)


def _data(request: ModelRequest, policy: PathPolicy, live: Live, source: Source, opened: _OpenedModel) -> DataSource:
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
            collation.note(f"no data was given: {name}, which stands beside the model, is used")
            return from_callable(load, request.batch, request.time_limit_s, collation)
        raise DataError(
            "the inputs of the model are unknown",
            "neither data nor input shapes were given",
            f"give {argument('data', 'file.py:callable')}, or shapes such as {argument('inputs', ['1x3x224x224'])}",
        )
    return random_data(specs, opened.module, 64, request.seed)


def _stated_inputs(signature: Signature | None) -> list[str]:
    """Return the input shapes of a program or artifact, unless a dimension other than the batch is dynamic."""
    if signature is None or any(isinstance(size, str) for tensor in signature.inputs for size in tensor.shape[1:]):
        return []
    return [f"{t.name}:{t.dtype}:{'x'.join(map(str, (1, *t.shape[1:])))}" for t in signature.inputs]


def _example_and_signature(
    opened: _OpenedModel, inputs: tuple[InputTensor, ...], evaluation: Samples, request: ModelRequest, size: int
) -> tuple[NamedBatch, Signature, list[str]]:
    """Return a synthetic example of `size` samples, the signature from real inputs, and notes."""
    real = repeat_to_size(evaluation, size)
    example = synthetic_like(real, request.seed)
    if opened.module is None:
        if opened.signature is None:
            raise ModelError("the program states no signature")
        return example, opened.signature, []
    dtypes = Signature(inputs, None).dtypes
    doing, limit_s = "running the model once", request.time_limit_s
    signature = call_user(doing, limit_s, first_forward, opened.module, inputs, as_tensors(real, dtypes))
    signature = signature.at_batch(1) if size == 1 else signature
    try:
        call_user(doing, limit_s, first_forward, opened.module, inputs, as_tensors(example, dtypes))
    except ModelError:  # inputs with constraints, such as lengths and offsets
        return real, signature, ["the model does not run on random inputs: check.npz holds evaluation samples"]
    return example, signature, []


def _counts(
    opened: _OpenedModel, signature: Signature, one: NamedBatch
) -> tuple[MacsCount | None, tuple[int, int] | None]:
    if opened.module is None:
        if opened.program is None:
            return None, None
        return MacsCount(count_program(opened.program, one).macs, None, {}), count_program_params(opened.program)
    args, kwargs = forward_args(signature, one)
    return count_macs(opened.module, args, kwargs), count_params(opened.module)


def _save_baseline(
    folder: Path,
    source: Source,
    opened: _OpenedModel,
    manifest: Manifest,
    example: NamedBatch,
    threads: int,
    work: Path,
) -> str | None:
    """Save the untouched model; returns why a live module could only be exported at batch 1, if so."""
    target = opened.program or opened.module
    session = ENGINES[manifest.runtime].open(target, manifest.signature, SessionSettings(threads, manifest.device))

    def recorded(batch: NamedBatch) -> OutputCheck:
        if opened.module is not None:  # a GPU rounds in its own way: the record is of the device
            opened.module.to(manifest.device)
        check = OutputCheck(batch, settled_outputs(session, batch))
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
        recipe, fixed = recipe_of_live(opened.module, manifest.signature, example, work / "live.pt2")
    if fixed:
        manifest = replace(manifest, signature=manifest.signature.at_batch(1))
        check = recorded(first_sample(example))
    artifacts.save_module(folder, opened.module, recipe, manifest, check)
    return fixed


def recipe_of(loaded: LoadedModel) -> Recipe:
    """Return the recipe of the model from its baseline artifact."""
    return artifacts.read_recipe(loaded.baseline)
