"""factorize: replace weights by low-rank products, fine-tune, and report the reopened artifact."""

from __future__ import annotations

from functools import partial

from torch import nn

from omgoptim.errors import DataError, argument
from omgoptim.operations.compression_job import apply_technique, open_job
from omgoptim.operations.context import RunContext
from omgoptim.operations.dry_run import plan_rounds
from omgoptim.operations.execution import refuse_unsendable
from omgoptim.operations.final_report import new_output_folder
from omgoptim.operations.loaded_model import Live, LoadedModel
from omgoptim.operations.report_builder import build_report
from omgoptim.operations.rounds.loop import CompressionGoal, choose_round, final_model_of, run_round
from omgoptim.operations.rounds.sensitivity import layer_sensitivity
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import FactorizeRequest
from omgoptim.requests.factorize import Svd, Whitened
from omgoptim.techniques.registry import Outcome, technique_of


def factorize(request: FactorizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Factorize weights and fine-tune. See `FactorizeRequest`."""
    output = new_output_folder(request, context)
    if request.sensitivity:
        refuse_unsendable(request, live)
    job = open_job(request, context, live, partial(_refuse_without_data, request))
    if request.plan:
        return plan_rounds(job, [request.method])
    points = layer_sensitivity(job, request.method) if request.sensitivity else []

    def compress(copied: nn.Module, span: tuple[float, float]) -> Outcome:
        context.progress("factorizing", span[0])
        return apply_technique(job, copied, request.method, job.module_run(span))

    kept = choose_round(job, [run_round(job, 1, _amount(request), job.original, compress, keep_zeros=False)])
    goal = CompressionGoal(_name(request.method))
    return build_report(job, final_model_of(job, kept, lambda _: goal, points), output)


def _refuse_without_data(request: FactorizeRequest, loaded: LoadedModel) -> None:
    if technique_of(request.method).needs_data and not loaded.data.real:
        raise DataError(
            f"method {request.method.method} needs data",
            "it minimizes the output error on real inputs, and no data was given",
            f"give {argument('data', 'file.py:callable')}; or use method svd, which needs no data and loses more",
        )


def _amount(request: FactorizeRequest) -> float | None:
    """Return the fraction of parameters to remove, where that is the goal."""
    compression = request.method.compression
    return None if compression is None else 1 - 1 / compression


def _name(method: Whitened | Svd) -> str:
    if method.rank is not None:
        goal = f"rank {method.rank}"
    elif method.energy is not None:
        goal = f"{method.energy:.3g} of the energy"
    elif method.rank_ratio is not None:
        goal = f"{method.rank_ratio:.0%} of each layer"
    else:
        goal = f"{method.compression:g}x fewer parameters"
    return f"low-rank factorization ({method.method}, {goal})"
