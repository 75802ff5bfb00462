"""Runs that measure on a target: the connection, and the target in the report and its next steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from omgoptim.errors import RequestError, RunError
from omgoptim.operations.context import RunContext
from omgoptim.reports import EfficiencyReport, NextStep
from omgoptim.requests import VERBS, OptimizeRequest, QuantizeRequest, Request, parse
from omgoptim.requests.command import command_of

MEASURED = "measured.jsonl"
"""File of a run's folder: the launches on a target, kept also where the run fails."""


@contextmanager
def on_target(request: Request, context: RunContext) -> Iterator[tuple[Request, RunContext]]:
    """Connect to the target of a request, if it has one, for as long as the run measures.

    Yields:
        The request with its engine, since only programs run there, and the context that measures there.

    Raises:
        SetupError: the target cannot be reached or used.
        RunError: the connection was lost and could not be made again in time.
    """
    address = getattr(request, "target", None)
    if address is None:
        yield request, context
        return
    from omgoptim.measure.target.client import Target, TargetGone
    from omgoptim.requests.base import TargetAddress

    unpaused = context.report_unpaused or context.progress
    unpaused(f"connecting to {address}", 0.0)
    runtime = str(getattr(request, "runtime", "auto"))
    if not isinstance(request, QuantizeRequest | OptimizeRequest) and runtime == "auto" and hasattr(request, "runtime"):
        runtime = "onnxruntime"
        request = request.model_copy(update={"runtime": runtime})
    kept = context.folder / MEASURED
    try:
        with Target(
            TargetAddress.parse(address),
            runtime,
            context.run_id,
            context.work,
            lambda doing: unpaused(doing, None),
            kept,
        ) as target:

            def report(stage: str, fraction: float | None) -> None:
                (unpaused if target.is_held else context.progress)(stage, fraction)

            yield (
                request,
                replace(
                    context,
                    target=target,
                    measuring=target.measuring,
                    measuring_here=context.measuring,
                    progress=report,
                ),
            )
    except TargetGone as gone:
        raise RunError(
            f"the connection to {address} was lost",
            f"{gone}; what was measured before is in {kept}",
            f"when it is back: omgoptim runs resume {context.run_id}",
        ) from None


def with_target(report: EfficiencyReport, context: RunContext) -> EfficiencyReport:
    """Add the target to the report, its notes and next steps."""
    if context.target is None or report.before is None:
        return report
    where = f"Measured on {context.target.address}: {context.target.machine.cpu}."
    update = {
        "summary": f"{report.summary} {where}",
        "warnings": [*report.warnings, *context.target.notes],
        "next_steps": [_there(step, str(context.target.address)) for step in report.next_steps],
    }
    return report.model_copy(update=update)


def _there(step: NextStep, address: str) -> NextStep:
    """Return a next step on the target, if a target can do it."""
    if "target" not in VERBS[step.tool].model_fields:
        return step
    arguments = step.arguments | {"target": address}
    try:
        command = command_of(step.tool, parse(step.tool, arguments))
    except RequestError:  # a torch engine
        return step
    return step.model_copy(update={"arguments": arguments, "command": command})
