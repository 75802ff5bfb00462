"""Students before training: given by the user, or derived from the teacher."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omgoptim.errors import DataError, ModelError, OmgoptimError, RequestError, UnknownModelError, did_you_mean
from omgoptim.measure.macs import count_macs
from omgoptim.measure.size import count_params
from omgoptim.models import artifact as artifacts
from omgoptim.models.forward import first_forward, input_tensors, name_inputs, to_numpy
from omgoptim.models.manifest import Manifest
from omgoptim.models.recipe import read_recipe
from omgoptim.models.samples import Samples, as_tensors, forward_args, repeat_to_size
from omgoptim.models.source import Source, load_source
from omgoptim.operations.compression_job import Job, apply_technique
from omgoptim.operations.datasets import one_sample, scoring_loss
from omgoptim.operations.loaded_model import Live, LoadedModel, recipe_of_live
from omgoptim.operations.per_sample_check import refuse_partial
from omgoptim.reports import Change
from omgoptim.requests import DistillRequest, Params
from omgoptim.requests.distill import STUDENTS, Auto, Given
from omgoptim.runtimes.signature import Signature, flatten
from omgoptim.techniques.registry import ModuleRun, Outcome, apply_to_module


@dataclass(frozen=True, slots=True)
class Student:
    """A module to train, and its recipe for a fresh process."""

    name: str
    scheme: str
    """Method of derivation, such as "narrow"; "given" for a module of the user."""
    module: nn.Module
    """Untrained module; not changed."""
    base: nn.Module
    """Base of its recorded structural diff: the teacher of a derived student, the untrained module of a given one."""
    loaded: LoadedModel
    """The teacher's, with the student's module and signature."""
    changes: Outcome
    notes: list[str] = field(default_factory=list)

    @property
    def params(self) -> int:
        """Number of parameters."""
        return count_params(self.module)[0]

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one sample; None where they cannot be counted."""
        args, kwargs = one_sample(self.loaded)
        return count_macs(self.module, args, kwargs).macs


def derive_student(job: Job[DistillRequest], params: Params, span: tuple[float, float]) -> Student:
    """Derive a student from a copy of the teacher.

    Raises:
        OmgoptimError: the technique does not support the teacher.
    """
    module = copy.deepcopy(job.original)
    outcome = apply_technique(job, module, params, job.module_run(span))
    refuse_partial(module, job.original, job.datasets.selection, job.loaded.signature, job.loaded.device)
    return as_student(job, params, module, outcome)


def derive_module(teacher: nn.Module, params: Params, inputs: Any, seed: int) -> nn.Module:
    """Derive a student outside of a run; in eval mode.

    The teacher is changed in place; `inputs` is one batch for it.

    Raises:
        RequestError: the params are not those of a derivation.
        OmgoptimError: the technique does not support the teacher.
    """
    if isinstance(params, (Auto, Given)):
        known = ", ".join(name for name in STUDENTS if name not in ("auto", "given"))
        raise RequestError(f"student '{params.bare('student')}' does not derive a student", f"known: {known}")
    named = [name_inputs(teacher, inputs)]
    tensors = {name: tensor for name, tensor, _ in named[0]}
    signature = first_forward(teacher, input_tensors(named), tensors)
    samples = Samples([{name: to_numpy(tensor) for name, tensor in tensors.items()}], [None])
    with tempfile.TemporaryDirectory() as scratch:
        run = ModuleRun(signature, samples, scoring_loss(None), copy.deepcopy(teacher), Path(scratch), seed)
        apply_to_module(teacher, params, run)
    return teacher.eval()


def as_student(job: Job[DistillRequest], params: Params, module: nn.Module, outcome: Outcome) -> Student:
    """Wrap a derived module as a student."""
    loaded = replace(job.loaded, module=module)
    return Student(name_of(params), scheme_of(params), module, job.original, loaded, outcome)


def name_of(params: Params) -> str:
    """Return the name of a derived student, such as `depthwise, width 0.5`."""
    own = params.model_dump(exclude_defaults=True, exclude={"student", "targets", "ignore"})
    settings = [
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in own.items() if isinstance(value, (int, float))
    ]
    settings += [f"{value} weights" for name, value in own.items() if name == "initialize"]
    return ", ".join([scheme_of(params), *settings])


def scheme_of(params: Params) -> str:
    """Return the method of derivation, such as `fewer layers`."""
    return params.bare("student").replace("_", " ")


def load_student(job: Job[DistillRequest], params: Given, live: Live) -> Student:
    """Load a student given by the user.

    Raises:
        ModelError: it cannot be loaded, or does not run on the teacher's inputs.
        RequestError: it is a program, or is quantized.
        DataError: its outputs differ in shape from the teacher's.
    """
    teacher = job.loaded
    torch.manual_seed(job.request.seed)
    source = Source(module=live.student) if live.student is not None else _load_student(job, params)
    module, recipe = source.module, source.recipe
    lineage: tuple[str, ...] = ()
    manifest = None if source.artifact is None else Manifest.read(source.artifact)
    if source.artifact is not None and manifest is not None and artifacts.has_module(manifest, teacher.policy):
        if manifest.precision != "float32":
            raise RequestError(
                f"the student is an artifact in {manifest.precision}",
                "training works on float32 weights",
                "distill the float student first, then quantize the result",
            )
        module = artifacts.load_module(source.artifact, manifest, teacher.policy)
        recipe, lineage = read_recipe(source.artifact), manifest.lineage
    if module is None:
        raise RequestError(
            "the student is a program, and training changes modules",
            "an ONNX file cannot be trained",
            "give the module it was exported from: file.py:callable",
        )
    signature = _signature(module, teacher, job.original)
    if recipe is None:
        recipe, _ = recipe_of_live(module, signature, teacher.example, job.context.work / "live_student.pt2")
    runs = tuple(dict.fromkeys((*lineage, *teacher.lineage)))
    loaded = replace(teacher, module=module, program=None, signature=signature, lineage=runs, recipe=recipe)
    return Student(
        name=params.source,
        scheme=params.student,
        module=module,
        base=copy.deepcopy(module),
        loaded=loaded,
        changes=_replacement(job.original, module),
        notes=list(source.notes),
    )


def _load_student(job: Job[DistillRequest], params: Given) -> Source:
    request, policy = job.request, job.loaded.policy
    try:
        return load_source(
            params.source,
            policy,
            checkpoint=params.student_checkpoint,
            kwargs=params.student_kwargs,
            limit_s=request.time_limit_s,
        )
    except UnknownModelError as error:
        known = did_you_mean(params.source, [name for name in STUDENTS if name != "given"])
        raise ModelError(
            f"'{params.source}' is not a student",
            f"it names no module, run or artifact of the project. {known}",
            "give file.py:callable, or one of the names",
        ) from error
    except ModelError as error:
        raise type(error)(f"the student: {error.what}", error.why, error.fix) from error


def _signature(module: nn.Module, teacher: LoadedModel, original: nn.Module) -> Signature:
    """Return the student's signature for the teacher's inputs; its outputs must have the teacher's shapes."""
    real = repeat_to_size(teacher.evaluation, 2)
    try:
        signature = first_forward(module, teacher.signature.inputs, as_tensors(real, teacher.signature.dtypes))
    except OmgoptimError as error:
        raise type(error)(
            f"the student does not run on the teacher's inputs: {error.what}",
            error.why,
            f"let its forward take {', '.join(teacher.signature.input_names)}, as the teacher's does",
        ) from error
    args, kwargs = forward_args(signature, real)
    with torch.inference_mode():
        shapes = [[tuple(leaf.shape) for leaf in flatten(each(*args, **kwargs))] for each in (module, original)]
    if shapes[0] != shapes[1]:
        raise DataError(
            "the student's outputs differ in shape from the teacher's",
            f"on two samples the student returns {_shape_list(shapes[0])}, the teacher {_shape_list(shapes[1])}",
            "let the student return what the teacher returns: as many classes, tokens or values, in the same order",
        )
    return signature


def _shape_list(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(str(shape) for shape in shapes)


def _replacement(teacher: nn.Module, student: nn.Module) -> Outcome:
    before, after = (f"{type(each).__name__}, {count_params(each)[0]:,} parameters" for each in (teacher, student))
    return Outcome([Change(path="", what="model", before=before, after=after)])
