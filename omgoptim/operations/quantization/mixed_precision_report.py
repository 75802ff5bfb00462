"""The search for layers to keep in float, in the report of the run."""

from __future__ import annotations

from omgoptim.operations.next_steps import same_arguments, step
from omgoptim.operations.quantization.final_race import Final
from omgoptim.operations.quantization.mixed_precision import MixedPrecision
from omgoptim.operations.quantization.selection import is_mixed
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import QuantizeRequest


def with_guard(
    report: EfficiencyReport, request: QuantizeRequest, mixed_precision: MixedPrecision | None, final: Final
) -> EfficiencyReport:
    """The report with the search in it: told in the summary where it decided, and the call that saves it next time."""
    if mixed_precision is None:
        return report
    winner = final.winner.result
    record = mixed_precision.record
    update: dict[str, object] = {"guard": record}
    chosen = is_mixed(winner) and winner.made.option.params == mixed_precision.option.params
    if chosen or not record.holds:
        update["summary"] = f"{report.summary} {record.why}"
    elif is_mixed(mixed_precision.best) and mixed_precision.best.why:
        why = mixed_precision.best.why
        update["summary"] = (
            f"{report.summary} Mixed precision ({mixed_precision.option.name}) was not delivered: {why}."
        )
    if chosen:
        option = winner.made.option
        at_once = request.model_copy(update={"scheme": option.params, "runtime": option.runtime})
        why = "trains again, with" if option.scheme == "qat" else "makes the same candidate at once, with"
        again = step("quantize", same_arguments(at_once), f"{why} these layers in float: the search is done")
        update["next_steps"] = [*report.next_steps[:2], again]
    elif record.out_of_time and not record.holds:
        longer = same_arguments(request) | {"guard_time_s": 4 * request.guard_time_s}
        again = step("quantize", longer, "the search for layers to keep in float ended for lack of time")
        update["next_steps"] = [*report.next_steps[:2], again]
    return report.model_copy(update=update)
