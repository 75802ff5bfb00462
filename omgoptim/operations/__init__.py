"""One function per verb: load, apply, save, measure in fresh processes, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omgoptim.errors import RequestError
from omgoptim.operations.context import RunContext
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import (
    CompareRequest,
    DistillRequest,
    FactorizeRequest,
    OptimizeRequest,
    ProfileRequest,
    PruneRequest,
    QuantizeRequest,
    Request,
)

if TYPE_CHECKING:
    from omgoptim.operations.loaded_model import Live

__all__ = ["RunContext", "run_verb"]


def run_verb(verb: str, request: Request, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Do what a request asks. Torch is imported here, not before.

    Args:
        live: objects of the caller's process, in place of what the request can only name.

    Raises:
        OmgoptimError: of the kind that fits: see `errors.py`.
    """
    report = _operation(verb, request, context, live)
    from omgoptim.operations.chained_gains import with_total_gain
    from omgoptim.operations.next_steps import new_calls

    report = with_total_gain(report, request, context)
    return report.model_copy(update={"next_steps": new_calls(report, request)})


def _operation(verb: str, request: Request, context: RunContext, live: Live | None) -> EfficiencyReport:
    if isinstance(request, ProfileRequest):
        from omgoptim.operations.profile import profile

        return profile(request, context, live)
    if isinstance(request, QuantizeRequest):
        from omgoptim.operations.quantize import quantize

        return quantize(request, context, live)
    if isinstance(request, PruneRequest):
        from omgoptim.operations.prune import prune

        return prune(request, context, live)
    if isinstance(request, FactorizeRequest):
        from omgoptim.operations.factorize import factorize

        return factorize(request, context, live)
    if isinstance(request, DistillRequest):
        from omgoptim.operations.distill import distill

        return distill(request, context, live)
    if isinstance(request, CompareRequest):
        from omgoptim.operations.compare import compare

        return compare(request, context)
    if isinstance(request, OptimizeRequest):
        from omgoptim.operations.optimize import optimize

        return optimize(request, context, live)
    raise RequestError(f"'{verb}' starts no run")
