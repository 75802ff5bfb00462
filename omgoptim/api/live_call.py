"""Python calls as requests in this process: live objects have placeholders in the request and are passed beside it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import ModelError, RequestError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.interpreter import Interpreter
from omgoptim.jobs.project import find_project
from omgoptim.jobs.states import load_report
from omgoptim.jobs.submit import open_run
from omgoptim.jobs.worker import execute
from omgoptim.operations import run_verb
from omgoptim.operations.context import LIVE
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import Request, parse

if TYPE_CHECKING:
    from torch import nn

    from omgoptim.operations.loaded_model import Live


def run(verb: str, request: Request, live: Live | None, progress: bool | None) -> EfficiencyReport:
    """Run a verb in this process, in a run folder of its own.

    Raises:
        OmgoptimError: what the operation raised; the run's folder has it too.
    """
    here = Interpreter(Path(sys.executable), "the caller's own process", platform.python_version(), ())
    folder = open_run(verb, request, find_project(getattr(request, "project", None)), here)
    with _callers_torch(), progress_display(folder, progress):
        execute(folder, lambda name, resolved, context: run_verb(name, resolved, context, live), owns_process=False)
    return load_report(folder)


@contextmanager
def _callers_torch() -> Iterator[None]:
    """Restore the caller's random state and number of threads of torch afterwards."""
    import torch

    threads, random = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def progress_display(folder: RunFolder, progress: bool | None) -> AbstractContextManager[None]:
    """Show the progress of a run if requested; by default in a notebook or on a terminal."""
    notebook = "ipykernel" in sys.modules
    if progress is False or (progress is None and not notebook and not sys.stdout.isatty()):
        return nullcontext()
    from omgoptim.cli.progress import watching

    return watching(folder, lines=notebook)


def request_of(
    verb: str, model: str | nn.Module, data: Any, metric: Any, arguments: dict[str, Any], loss: Any = None
) -> tuple[Request, Live]:
    """Return the request, in which live objects have placeholder names, and the live objects."""
    from omgoptim.models.source import training_mode_notes
    from omgoptim.operations.loaded_model import Live, by_split

    is_source = isinstance(model, str)
    named: dict[str, Any] = {"model": model if is_source else LIVE.format("module"), **arguments}
    if data is not None:
        named["data"] = data if isinstance(data, str) else LIVE.format("data")
    if metric is not None:
        named["metric"] = metric if isinstance(metric, str) else LIVE.format("metric")
    if loss is not None:
        named["loss"] = loss if isinstance(loss, str) else LIVE.format("loss")
    live = Live(
        module=None if isinstance(model, str) else cpu_copy(model),
        data=None if data is None or isinstance(data, str) else by_split(data),
        metric=None if isinstance(metric, str) else metric,
        loss=None if isinstance(loss, str) else loss,
        notes=() if isinstance(model, str) else tuple(training_mode_notes(model)),
    )
    return parse(verb, named), live


def search_request(
    model: Any, space: Any, data: Any, metric: Any, loss: Any, arguments: dict[str, Any]
) -> tuple[Request, Live]:
    """Return the request of `search` and its live objects; the model or the space may be a function of a trial."""
    from dataclasses import replace

    from torch import nn

    alone = callable(model) and not isinstance(model, nn.Module)
    function = model if alone else space if callable(space) else None
    named = LIVE.format("space") if callable(space) else space
    source = LIVE.format("space") if alone else model
    request, live = request_of("search", source, data, metric, {"space": named, **arguments}, loss)
    return request, replace(live, space=function)


def cpu_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a module on the CPU in eval mode."""
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
