"""The Python face: the same verbs on a source or a live module, in this process, measured from the reopened artifact.

report = omgoptim.quantize(model, data=load, max_quality_drop=0.01)
small = omgoptim.open_artifact(report.artifact.path)
small(images)                                  # the original's forward signature
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import Unpack

from omgoptim.errors import ModelError, RequestError
from omgoptim.jobs.folder import RunFolder, find_run, project_of, runs_root
from omgoptim.jobs.inline import run_inline
from omgoptim.jobs.pick import pick as pick_from
from omgoptim.jobs.project import find_project
from omgoptim.models.artifact import made_in
from omgoptim.models.opened import OpenedModel
from omgoptim.models.opened import open_artifact as open_folder
from omgoptim.models.trust import Reach
from omgoptim.operations import run_verb
from omgoptim.operations.context import LIVE, RunContext
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Request, parse
from omgoptim.requests.arguments import (
    CompareArguments,
    DistillArguments,
    FactorizeArguments,
    ProfileArguments,
    PruneArguments,
    QuantizeArguments,
)
from omgoptim.requests.typed import help_of, signature_of

if TYPE_CHECKING:
    from torch import nn

    from omgoptim.operations.subject import Live


Verb = TypeVar("Verb", bound=Callable[..., EfficiencyReport])


def _documented(verb: str) -> Callable[[Verb], Verb]:
    """Give a verb's function the signature and help of its request, for `help()` and completion in a notebook."""

    def documented(function: Verb) -> Verb:
        words = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = f"{words}\n\nArguments by name:\n{help_of(verb)}\n"
        function.__signature__ = signature_of(verb, function)  # type: ignore[attr-defined]
        return function

    return documented


@_documented("profile")
def profile(
    model: str | nn.Module,
    *,
    data: Any = None,
    metric: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[ProfileArguments],
) -> EfficiencyReport:
    """Measure a model as it is.

    Args:
        model: a source, as for the other faces, or a module of this process; it is not changed.
        data: a source; or a callable taking `split`; or a mapping of split name to a DataLoader or list of batches.
        metric: a name or source; or a callable `metric(outputs, targets) -> float`, higher is better.
        progress: whether to show on standard error where the run stands; None: in a notebook or on a terminal.
        arguments: as listed below.

    Raises:
        OmgoptimError: of the kind that fits: see `omgoptim.errors`.
    """
    request, live = _request("profile", model, data, metric, dict(arguments))
    return _run("profile", request, live, progress)


@_documented("quantize")
def quantize(
    model: str | nn.Module,
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = None,
    progress: bool | None = None,
    **arguments: Unpack[QuantizeArguments],
) -> EfficiencyReport:
    """Quantize a model and keep the fastest candidate that holds the quality guard.

    Args:
        model: a source, as for the other faces, or a module of this process; it is not changed.
        data: a source; or a callable taking `split`; or a mapping of split name to a DataLoader or list of batches.
        metric: a name or source; or a callable `metric(outputs, targets) -> float`, higher is better.
        loss: of scheme qat, as for `prune`.
        progress: as for `profile`.
        arguments: as listed below.

    Raises:
        OmgoptimError: of the kind that fits: see `omgoptim.errors`.
    """
    request, live = _request("quantize", model, data, metric, dict(arguments), loss)
    return _run("quantize", request, live, progress)


@_documented("prune")
def prune(
    model: str | nn.Module,
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[PruneArguments],
) -> EfficiencyReport:
    """Take weights away, train the rest back, and measure the saved artifact against the original.

    Args:
        model: a source, as for the other faces, or a module of this process; it is not changed.
        data: a source; or a callable taking `split`; or a mapping of split name to a DataLoader or list of batches.
            Training takes its `train` split.
        metric: a name or source; or a callable `metric(outputs, targets) -> float`, higher is better.
        loss: auto or a source; or a callable `loss(outputs, targets)` that returns a scalar tensor.
        progress: as for `profile`.
        arguments: as listed below.

    Raises:
        OmgoptimError: of the kind that fits: see `omgoptim.errors`.
    """
    request, live = _request("prune", model, data, metric, dict(arguments), loss)
    return _run("prune", request, live, progress)


@_documented("factorize")
def factorize(
    model: str | nn.Module,
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[FactorizeArguments],
) -> EfficiencyReport:
    """Write large weights as products of thin ones, train back what that costs, and measure the saved artifact.

    Args:
        model, data, metric, loss: as for `prune`.
        progress: as for `profile`.
        arguments: as listed below.

    Raises:
        OmgoptimError: of the kind that fits: see `omgoptim.errors`.
    """
    request, live = _request("factorize", model, data, metric, dict(arguments), loss)
    return _run("factorize", request, live, progress)


@_documented("distill")
def distill(
    teacher: str | nn.Module,
    student: str | nn.Module = "auto",
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[DistillArguments],
) -> EfficiencyReport:
    """Train a smaller student to answer as the teacher does, and measure the saved student against the teacher.

    Args:
        teacher: a source, as for the other faces, or a module of this process; it is not changed.
        student: a source, or a module of this process (a copy is trained); or how to derive one from the teacher:
            auto, narrow, depthwise, inverted_residual, low_rank, fewer_layers.
        data, metric, loss: as for `prune`; labels are welcome and not needed.
        progress: as for `profile`.
        arguments: as listed below.

    Raises:
        OmgoptimError: of the kind that fits: see `omgoptim.errors`.
    """
    named = student if isinstance(student, str) else LIVE.format("student")
    request, live = _request("distill", teacher, data, metric, {"student": named, **arguments}, loss)
    if not isinstance(student, str):
        live = replace(live, student=_copy(student))
    return _run("distill", request, live, progress)


def derive_student(
    teacher: nn.Module, student: str = "narrow", *, inputs: Any, seed: int = 0, **parameters: Any
) -> nn.Module:
    """A student derived from a teacher, not yet trained; the teacher is not changed.

    Args:
        student: narrow, depthwise, inverted_residual, low_rank or fewer_layers.
        inputs: one batch of at least two samples, as the teacher takes it: a tensor, a tuple, or a dict of tensors.
            Real ones: what is left of the teacher's weights is fitted to what it gives for them.
        parameters: the student's own, such as width=0.5; see the params classes in `omgoptim.requests.distill`.

    Raises:
        OmgoptimError: of the kind that fits: see `omgoptim.errors`.
    """
    from omgoptim.operations.student import derived_alone

    request = parse("distill", {"model": LIVE.format("module"), "student": student, **parameters})
    return derived_alone(_copy(teacher), getattr(request, "student"), inputs, seed)  # noqa: B009  DistillRequest has it


@_documented("compare")
def compare(a: str, b: str, *, progress: bool | None = None, **arguments: Unpack[CompareArguments]) -> EfficiencyReport:
    """Measure artifact or run `b` against `a`.

    Args:
        a, b: run ids or artifact folders.
        progress: as for `profile`.
        arguments: as listed below.

    Raises:
        OmgoptimError: of the kind that fits: see `omgoptim.errors`.
    """
    return _run("compare", parse("compare", {"a": a, "b": b, **arguments}), None, progress)


def pick(run_id: str, name: str, *, project: str | None = None) -> EfficiencyReport:
    """Deliver another finalist of a quantize run: its artifact and report take the place of the run's.

    Nothing is computed again. What was delivered before is kept among the alternatives.

    Args:
        name: of an entry of the report's `alternatives`.

    Raises:
        RunError: there is no such run, or it keeps nothing of that name.
    """
    return pick_from(find_run(find_project(project), run_id), name)


def open_artifact(
    path: str | Path,
    *,
    trust: bool = False,
    allow_path: Iterable[str | Path] = (),
    allow_module: Iterable[str] = (),
    threads: int | None = None,
) -> OpenedModel:
    """Open an artifact folder, or a run id of this project, as a callable with the original's forward signature.

    Tensors in give tensors out, arrays in give arrays out. Every file is checked against its recorded sha256. A recipe
    runs only if you made the artifact, or with `trust`; and then it runs only code of the project (the one that the
    run's folder lies in; else the one that you made it in, or the working directory) and of what is allowed here.

    Args:
        path: the artifact folder, or a run id.
        trust: open an artifact that you did not make though its recipe runs code.
        allow_path: further folders whose code the recipe may name.
        allow_module: installed modules whose functions and classes it may name, such as `timm.models`.
        threads: CPU threads; default: the cores this process may use.

    Raises:
        ArtifactError: it is no artifact, is damaged, its engine is not installed, or its recipe runs code that may not
            run.
    """
    folder = Path(path)
    if not folder.is_dir() and len(folder.parts) == 1:
        folder = runs_root(find_project(None)) / folder / "artifact"
    folders = [str(each) for each in allow_path]
    project = project_of(folder)
    if project is None:
        project = Path.cwd()
        folders += filter(None, [made_in(folder)])
    return open_folder(folder, Reach.of(project, folders, list(allow_module), trust_artifact=trust), threads)


def _run(verb: str, request: Request, live: Live | None, progress: bool | None) -> EfficiencyReport:
    project = find_project(getattr(request, "project", None))

    def operation(resolved: Request, context: RunContext) -> EfficiencyReport:
        return run_verb(verb, resolved, context, live)

    return run_inline(verb, request, project, operation, lambda folder: _shown(folder, progress))


def _shown(folder: RunFolder, progress: bool | None) -> AbstractContextManager[None]:
    """Show where a run stands, if that was asked for, or where a person looks: in a notebook or on a terminal."""
    notebook = "ipykernel" in sys.modules
    if progress is False or (progress is None and not notebook and not sys.stdout.isatty()):
        return nullcontext()
    from omgoptim.cli.progress import watching

    return watching(folder, lines=notebook)


def _request(
    verb: str, model: str | nn.Module, data: Any, metric: Any, arguments: dict[str, Any], loss: Any = None
) -> tuple[Request, Live]:
    """The request that names what can be named, and the live objects beside it."""
    from omgoptim.models.source import training_mode_notes
    from omgoptim.operations.live import Live, by_split

    is_source = isinstance(model, str)
    named: dict[str, Any] = {"model": model if is_source else LIVE.format("module"), **arguments}
    if data is not None:
        named["data"] = data if isinstance(data, str) else LIVE.format("data")
    if metric is not None:
        named["metric"] = metric if isinstance(metric, str) else LIVE.format("metric")
    if loss is not None:
        named["loss"] = loss if isinstance(loss, str) else LIVE.format("loss")
    live = Live(
        module=None if isinstance(model, str) else _copy(model),  # refuses what is no module
        data=None if data is None or isinstance(data, str) else by_split(data),
        metric=None if isinstance(metric, str) else metric,
        loss=None if isinstance(loss, str) else loss,
        notes=() if isinstance(model, str) else tuple(training_mode_notes(model)),
    )
    return parse(verb, named), live


def _copy(model: nn.Module) -> nn.Module:
    import copy

    from torch import nn

    if not isinstance(model, nn.Module):
        raise RequestError(f"the model is a {type(model).__name__}", "a source (text) or a torch.nn.Module is needed")
    try:
        return copy.deepcopy(model).cpu().eval()
    except Exception as error:  # whatever a module holds that cannot be copied: a lock, a tensor with a history
        raise ModelError(
            "the module cannot be copied",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "give it as file.py:callable: then it is built from its own code",
        ) from error
