"""One function per verb: load, apply, save, measure in fresh processes, report."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from omgoptim.errors import RequestError, did_you_mean
from omgoptim.operations.context import RunContext
from omgoptim.operations.target import on_target, with_target
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import REGISTRY, ModelRequest, Request
from omgoptim.requests.training import is_head

if TYPE_CHECKING:
    from omgoptim.operations.loaded_model import Live

Operation = Callable[..., EfficiencyReport]
"""`operation(request, context, live)`; without `live` for a verb that takes no model."""

__all__ = ["RunContext", "operation_of", "run_verb"]


def run_verb(verb: str, request: Request, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Execute a request. Torch is imported here, not before.

    Args:
        verb: its name in the registry.
        request: of that verb.
        context: folder, progress and device lock of the run.
        live: objects of the caller's process, in place of what the request can only name.

    Raises:
        OmgoptimError: the run failed; the subclasses in `errors.py` say why.
    """
    if is_head(getattr(request, "on", "local")):
        from omgoptim.operations.ray_job import run_as_job

        return run_as_job(verb, cast(ModelRequest, request), context, live)
    operation = operation_of(verb)
    with on_target(request, context) as (request, context):
        report = operation(request, context, live) if REGISTRY[verb].on_model else operation(request, context)
        report = with_target(report, context)
    from omgoptim.operations.gain_attribution import with_total_gain
    from omgoptim.operations.next_steps import without_repeats

    report = with_total_gain(report, request, context)
    return report.model_copy(update={"next_steps": without_repeats(report, request)})


def operation_of(verb: str) -> Operation:
    """Import the function that the registry names for a verb.

    Raises:
        RequestError: the verb starts no run.
    """
    if verb not in REGISTRY:
        raise RequestError(f"'{verb}' starts no run", did_you_mean(verb, REGISTRY))
    module, _, name = REGISTRY[verb].operation.partition(":")
    operation: Operation = getattr(importlib.import_module(module), name)
    return operation
