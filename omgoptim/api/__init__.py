"""Python interface: the verbs on a source or a live module, in this process, measured on the reopened artifact.

report = omgoptim.quantize(model, data=load, max_quality_drop=0.01)
small = omgoptim.open_artifact(report.artifact.path)
small(images)                                  # the original's forward signature

Each function raises an OmgoptimError of the kind that fits: see `omgoptim.errors`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import Unpack

from omgoptim.api.artifacts import export_coreml, open_artifact, pick
from omgoptim.api.live_call import cpu_copy, request_of, run, search_request
from omgoptim.operations.context import LIVE
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import parse
from omgoptim.requests.arguments import (
    CompareArguments,
    DistillArguments,
    DistillStudent,
    FactorizeArguments,
    FactorizeMethod,
    OptimizeArguments,
    ProfileArguments,
    PruneArguments,
    PruneMethod,
    QuantizeArguments,
    QuantizeScheme,
    SearchArguments,
)
from omgoptim.requests.distill import Student
from omgoptim.requests.factorize import FactorMethod
from omgoptim.requests.prune import Method
from omgoptim.requests.quantize import Scheme
from omgoptim.requests.typed import help_of, signature_of

__all__ = [
    "compare",
    "derive_student",
    "distill",
    "export_coreml",
    "factorize",
    "open_artifact",
    "optimize",
    "pick",
    "profile",
    "prune",
    "quantize",
    "search",
]

if TYPE_CHECKING:
    from torch import nn


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
        model: a source such as net.py:build, or a module of this process; it is not changed.
        data: a source; or a callable taking `split`; or a mapping of split name to a DataLoader or list of batches.
        metric: a name or source; or a callable `metric(outputs, targets) -> float`, higher is better.
        progress: whether to show on standard error where the run stands; None: in a notebook or on a terminal.
        arguments: as listed below.

    Example:
        >>> report = omgoptim.profile("net.py:build", data="net.py:load")  # doctest: +SKIP
        >>> report.before.latency_ms_p50  # doctest: +SKIP
    """
    request, live = request_of("profile", model, data, metric, dict(arguments))
    return run("profile", request, live, progress)


@_documented("quantize")
def quantize(
    model: str | nn.Module,
    scheme: QuantizeScheme | Scheme | dict[str, Any] = "auto",
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = None,
    progress: bool | None = None,
    **arguments: Unpack[QuantizeArguments],
) -> EfficiencyReport:
    """Quantize a model and keep the fastest candidate that holds the quality guard.

    Args:
        model: a source such as net.py:build, or a module of this process; it is not changed.
        scheme: a name, or its parameters such as `omgoptim.Static(num_bits=8)`; auto tries all that fit.
        data: a source; or a callable taking `split`; or a mapping of split name to a DataLoader or list of batches.
        metric: a name or source; or a callable `metric(outputs, targets) -> float`, higher is better.
        loss: of scheme qat, as for `prune`.
        progress: as for `profile`.
        arguments: as listed below.

    Example:
        >>> import torch, omgoptim
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> plan = omgoptim.quantize(net, omgoptim.Dynamic(), inputs=["8x16"], plan=True)
        >>> plan.verb, plan.artifact
        ('quantize', None)
    """
    request, live = request_of("quantize", model, data, metric, {"scheme": scheme, **arguments}, loss)
    return run("quantize", request, live, progress)


@_documented("prune")
def prune(
    model: str | nn.Module,
    method: PruneMethod | Method | dict[str, Any] = "structured",
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[PruneArguments],
) -> EfficiencyReport:
    """Prune a model, fine-tune it, and measure the saved artifact against the original.

    Args:
        model: a source such as net.py:build, or a module of this process; it is not changed.
        method: a name, or its parameters such as `omgoptim.Magnitude(sparsity=0.9)`.
        data: a source; or a callable taking `split`; or a mapping of split name to a DataLoader or list of batches.
            Training takes its `train` split.
        metric: a name or source; or a callable `metric(outputs, targets) -> float`, higher is better.
        loss: auto or a source; or a callable `loss(outputs, targets)` that returns a scalar tensor.
        progress: as for `profile`.
        arguments: as listed below.

    Example:
        >>> import torch, omgoptim
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> plan = omgoptim.prune(net, omgoptim.Magnitude(sparsity=0.9), inputs=["8x16"], plan=True)
        >>> plan.verb, plan.artifact
        ('prune', None)
    """
    request, live = request_of("prune", model, data, metric, {"method": method, **arguments}, loss)
    return run("prune", request, live, progress)


@_documented("factorize")
def factorize(
    model: str | nn.Module,
    method: FactorizeMethod | FactorMethod | dict[str, Any] = "whitened",
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[FactorizeArguments],
) -> EfficiencyReport:
    """Replace large weights by low-rank factors, fine-tune, and measure the saved artifact.

    Args:
        model: a source such as net.py:build, or a module of this process; it is not changed.
        method: a name, or its parameters such as `omgoptim.Svd(rank_ratio=0.5)`.
        data: as for `prune`.
        metric: as for `prune`.
        loss: as for `prune`.
        progress: as for `profile`.
        arguments: as listed below.

    Example:
        >>> import torch, omgoptim
        >>> net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> plan = omgoptim.factorize(net, omgoptim.Svd(rank_ratio=0.5), inputs=["8x16"], plan=True)
        >>> plan.verb, plan.artifact
        ('factorize', None)
    """
    request, live = request_of("factorize", model, data, metric, {"method": method, **arguments}, loss)
    return run("factorize", request, live, progress)


@_documented("distill")
def distill(
    teacher: str | nn.Module,
    student: DistillStudent | str | Student | dict[str, Any] | nn.Module = "auto",
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[DistillArguments],
) -> EfficiencyReport:
    """Train a smaller student on the teacher's outputs, and measure the saved student against the teacher.

    Args:
        teacher: a source such as net.py:build, or a module of this process; it is not changed.
        student: a source, or a module of this process (a copy is trained); or how to derive one from the teacher: a
            name, or its parameters such as `omgoptim.Narrow(width=0.5)`.
        data: as for `prune`; labels are welcome and not needed.
        metric: as for `prune`.
        loss: as for `prune`.
        progress: as for `profile`.
        arguments: as listed below.

    Example:
        >>> import torch, omgoptim
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> batches = [(torch.randn(32, 16), torch.randint(0, 4, (32,)))]
        >>> plan = omgoptim.distill(teacher, omgoptim.Narrow(width=0.5), data=lambda split: batches, plan=True)
        >>> plan.verb, plan.artifact
        ('distill', None)
    """
    named = LIVE.format("student") if callable(student) else student
    request, live = request_of("distill", teacher, data, metric, {"student": named, **arguments}, loss)
    if callable(student):
        live = replace(live, student=cpu_copy(student))
    return run("distill", request, live, progress)


def derive_student(
    teacher: nn.Module, student: str = "narrow", *, inputs: Any, seed: int = 0, **parameters: Any
) -> nn.Module:
    """Derive an untrained student from a teacher; the teacher is not changed.

    Args:
        teacher: the module to derive from, in any mode.
        student: narrow, depthwise, inverted_residual, low_rank or fewer_layers.
        inputs: one batch of at least two samples, as the teacher takes it: a tensor, a tuple, or a dict of tensors.
            Real ones: what is left of the teacher's weights is fitted to what it gives for them.
        seed: of what is drawn at random.
        parameters: the student's own, such as width=0.5; see the params classes in `omgoptim.requests.distill`.

    Example:
        >>> import torch, omgoptim
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
        >>> student = omgoptim.derive_student(teacher, "narrow", width=0.5, inputs=torch.randn(32, 8))
        >>> student[0]
        Linear(in_features=8, out_features=32, bias=True)
    """
    from omgoptim.operations.distillation.student import derive_module

    request = parse("distill", {"model": LIVE.format("module"), "student": student, **parameters})
    return derive_module(cpu_copy(teacher), getattr(request, "student"), inputs, seed)  # noqa: B009  DistillRequest has it


@_documented("optimize")
def optimize(
    model: str | nn.Module,
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[OptimizeArguments],
) -> EfficiencyReport:
    """Make a model as small and fast as possible within a quality drop and a time budget.

    Args:
        model: a source such as net.py:build, or a module of this process; it is not changed.
        data: as for `prune`.
        metric: as for `prune`.
        loss: as for `prune`.
        progress: as for `profile`.
        arguments: as listed below.

    Example:
        >>> report = omgoptim.optimize("net.py:build", data="net.py:load", budget_minutes=10)  # doctest: +SKIP
        >>> report.artifact.path  # doctest: +SKIP
    """
    request, live = request_of("optimize", model, data, metric, dict(arguments), loss)
    return run("optimize", request, live, progress)


@_documented("search")
def search(
    model: str | nn.Module | Callable[..., Any],
    space: str | Callable[..., Any] | None = None,
    *,
    data: Any = None,
    metric: Any = "auto",
    loss: Any = "auto",
    progress: bool | None = None,
    **arguments: Unpack[SearchArguments],
) -> EfficiencyReport:
    """Search for the network of best quality that meets a target on this machine.

    Args:
        model: a source such as net.py:build, or a module of this process; or, without a space, a function
            `space(trial)` that returns a module.
        space: auto (vary the model's own stages), a source, or a function `space(trial)`, with the model as teacher.
        data: as for `prune`.
        metric: as for `prune`.
        loss: as for `prune`.
        progress: as for `profile`.
        arguments: as listed below.

    Example:
        >>> report = omgoptim.search("net.py:space", data="load.py:load", target_latency_ms=4)  # doctest: +SKIP
    """
    return run("search", *search_request(model, space, data, metric, loss, dict(arguments)), progress)


@_documented("compare")
def compare(a: str, b: str, *, progress: bool | None = None, **arguments: Unpack[CompareArguments]) -> EfficiencyReport:
    """Measure an artifact or run `b` against `a`.

    Args:
        a: run id or artifact folder of the reference.
        b: run id or artifact folder that is measured against it.
        progress: as for `profile`.
        arguments: as listed below.

    Example:
        >>> import omgoptim
        >>> omgoptim.compare("first_run_id", "second_run_id").summary  # doctest: +SKIP
    """
    return run("compare", parse("compare", {"a": a, "b": b, **arguments}), None, progress)
