"""The guard: where int8 from calibration data loses too much, find the few layers that must stay in float.

Layers are ranked by their simulated noise at the model's output (`techniques/quantize/noise.py`), so that only few
sets get a full evaluation, and `guard_search.py` decides which. An evaluation is a candidate like any other: made,
saved, opened in a fresh process and run on the selection samples, the same for it and the original.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.models.globs import names
from omgoptim.models.onnx_graph import Layer
from omgoptim.models.samples import Samples
from omgoptim.operations.advice import same_arguments, step
from omgoptim.operations.candidates import Option, Program
from omgoptim.operations.context import RunContext
from omgoptim.operations.guard_search import Found, Keepable, search
from omgoptim.operations.screening import Attempt, Yardstick, screen, within
from omgoptim.operations.splits import Splits
from omgoptim.operations.subject import Subject
from omgoptim.operations.trial import CALIBRATED, Trials
from omgoptim.operations.verdict import holds
from omgoptim.reports import EfficiencyReport, Guard
from omgoptim.requests import Params, QuantizeRequest
from omgoptim.techniques.quantize.noise import LayerSqnr, NoiseReport, measure_noise
from omgoptim.techniques.quantize.simulation import Simulation, simulation_of

RANKING_SHARE = 1 / 3
"""Part of the guard's time that ranking the layers may take."""

Predict = Callable[[tuple[str, ...]], float]
"""Noise over signal at the output with the layers of these names in float."""

NAMED = 4
"""Layers that a sentence names."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """How the search ended."""

    record: Guard
    option: Option
    """The candidate that it ended with; the plain one if nothing better was found."""
    ignore: list[str]
    """What `ignore` must name to get that candidate at once."""
    base: Attempt
    """The candidate without layers in float that it began with."""
    known: dict[str, Attempt]
    """What was evaluated: `Trials.known`."""


def repair(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    program: Program,
    attempts: list[Attempt],
    splits: Splits,
    yardstick: Yardstick | None,
    clock: Callable[[], float] = time.monotonic,
) -> Guarded | None:
    """Search for the layers to keep in float, if int8 from calibration data fails the guard and could still pay.

    What it tries is added to `attempts`; the best of it is timed like the others, on every engine that its plain
    sibling was tried on.

    Returns:
        How it ended; None where there was nothing to do.
    """
    base = _worth_repairing(attempts, request.max_quality_drop)
    if base is None or base.drop is None or yardstick is None or program.path is None:
        return None
    start = clock()
    trials = Trials(
        context, subject, program, splits.calibration, yardstick, request.seed, start + request.guard_time_s, clock
    )
    limit_s = request.guard_time_s * RANKING_SHARE
    noise, predict, untold = _ranking(base.made.option.params, subject, program, splits.calibration, context, limit_s)
    layers = keepable(noise) if noise else []

    def option_of(kept: tuple[str, ...]) -> Option:
        return keeping(base.made.option, kept)

    def evaluate(kept: tuple[str, ...]) -> float:
        attempt = trials.of(option_of(kept), f"guard: {_count(len(kept))} in float")
        return attempt.drop if attempt.drop is not None else float("inf")

    found = search(layers, base.drop, request.max_quality_drop, evaluate, trials.out_of_time, holds, predict)
    best = trials.of(option_of(found.best.kept), "guard") if found.best.kept else base
    _tell(trials.attempts, request.max_quality_drop)
    if best is not base:
        _time_it(request, context, subject, trials, attempts, base, best, splits.selection)
    attempts.extend(trials.attempts)
    record = _record(found, layers, noise, untold, base, trials.evaluations, clock() - start, request)
    return Guarded(record, best.made.option, list(found.best.kept), base, trials.known)


def with_guard(
    report: EfficiencyReport, request: QuantizeRequest, guarded: Guarded | None, winner: Attempt
) -> EfficiencyReport:
    """The report with the search in it: told in the summary where it decided, and the call that saves it next time."""
    if guarded is None:
        return report
    update: dict[str, object] = {"guard": guarded.record}
    chosen = winner.made.option.note and winner.made.option.params == guarded.option.params
    if chosen or not guarded.record.holds:
        update["summary"] = f"{report.summary} {guarded.record.why}"
    if chosen:
        option = winner.made.option
        at_once = request.model_copy(update={"scheme": option.params, "runtime": option.runtime})
        why = "trains again, with" if option.scheme == "qat" else "makes the same candidate at once, with"
        again = step("quantize", same_arguments(at_once), f"{why} these layers in float: the search is done")
        update["next_steps"] = [*report.next_steps[:2], again]
    elif guarded.record.stopped and not guarded.record.holds:
        longer = same_arguments(request) | {"guard_time_s": 4 * request.guard_time_s}
        again = step("quantize", longer, "the search for layers to keep in float ended for lack of time")
        update["next_steps"] = [*report.next_steps[:2], again]
    return report.model_copy(update=update)


def _worth_repairing(attempts: Sequence[Attempt], guard: float) -> Attempt | None:
    """The calibrated candidate to start from: the one that loses least, on its fastest engine.

    None if one of them holds the guard as it is, or if another that holds is as fast: layers in float only slow it.
    """
    alive = [attempt for attempt in attempts if attempt.timing and attempt.drop is not None and not attempt.error]
    calibrated = [attempt for attempt in alive if attempt.made.option.scheme in CALIBRATED]
    if not calibrated or any(within(attempt, guard) for attempt in calibrated):
        return None
    closest = min(calibrated, key=lambda attempt: (attempt.drop or 0.0, -attempt.speedup))
    same = [attempt for attempt in calibrated if attempt.made.option.params == closest.made.option.params]
    base = max(same, key=lambda attempt: attempt.speedup)
    holding = max((attempt.speedup for attempt in alive if within(attempt, guard)), default=0.0)
    return base if base.speedup > holding else None


def simulate(params: Params, subject: Subject, program: Program, calibration: Samples) -> Simulation:
    """The program with a switch on every layer that these params quantize.

    Raises:
        TechniqueError: there is no program, it cannot be simulated, or no layer of it can.
    """
    if program.path is None:
        raise TechniqueError("no layer can be simulated", "the model has no program")
    threads = subject.bench.threads
    simulation = simulation_of(program.path, calibration.batches, params, threads=threads)
    if not simulation.layers:
        raise TechniqueError("no layer can be simulated", "none reads a stored float32 weight")
    return simulation


def _ranking(
    params: Params, subject: Subject, program: Program, calibration: Samples, context: RunContext, limit_s: float
) -> tuple[NoiseReport | None, Predict | None, str]:
    """The noise of each layer that these params quantize, and of all without some; or why it is not known."""
    context.progress("guard: measuring the noise of each layer", None)
    try:
        simulation = simulate(params, subject, program, calibration)
        noise = measure_noise(simulation, limit_s=limit_s)
    except OmgoptimError as error:  # a program that the simulation cannot take still has its candidates
        return None, None, f"{error.what}: {error.why}"
    nodes = {layer.name: entry.layer.node for layer, entry in zip(keepable(noise), noise.layers, strict=True)}

    def predict(kept: tuple[str, ...]) -> float:
        return float(10 ** (-simulation.sqnr(simulation.nodes - {nodes[name] for name in kept}) / 10))

    return noise, predict, ""


def keepable(noise: NoiseReport) -> list[Keepable]:
    """The layers as the search knows them, each under a name that means it alone."""
    entries = [(entry, entry.layer) for entry in noise.layers]
    paths = Counter(layer.path for _, layer in entries)
    return [
        Keepable(_name(layer, [other for _, other in entries], paths), layer.path, layer.weight_bytes, entry.power)
        for entry, layer in entries
    ]


def _name(layer: Layer, others: Sequence[Layer], paths: Counter[str]) -> str:
    """A layer's path, or its node's name where the path would name others too."""
    plain = not set(layer.path) & set("*?[")
    alone = paths[layer.path] == 1 and not any(names(layer.path, other.path) for other in others if other is not layer)
    return layer.path if plain and alone else layer.node


def keeping(option: Option, kept: Sequence[str]) -> Option:
    """The option with these layers in float as well."""
    if not kept:
        return option
    ignore = [*getattr(option.params, "ignore", []), *kept]
    return Option(option.params.model_copy(update={"ignore": ignore}), option.runtime, f"{_count(len(kept))} in float")


def _count(layers: int) -> str:
    return f"{layers} layer{'s' if layers != 1 else ''}"


def _tell(tried: Sequence[Attempt], guard: float) -> None:
    """Why each of the search's candidates is not the artifact, unless it is timed and becomes one."""
    for attempt in tried:
        if attempt.error is not None:
            attempt.status, attempt.why = "failed", f"{attempt.error.what}: {attempt.error.why}".strip(": ")
        elif within(attempt, guard):
            attempt.why = "tried by the guard; fewer layers in float hold it too"
        else:
            attempt.why = f"tried by the guard: quality drop {attempt.drop:.4f} is above {guard:g}"


def _time_it(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    trials: Trials,
    attempts: Sequence[Attempt],
    base: Attempt,
    best: Attempt,
    selection: Samples,
) -> None:
    """Time the best set, on each engine that its plain sibling ran on."""
    others = {
        attempt.made.option.runtime
        for attempt in attempts
        if attempt.timing and attempt.made.option.params == base.made.option.params
    }
    timed = [best]
    for runtime in sorted(others - {best.made.option.runtime}):
        if not trials.out_of_time():
            timed.append(trials.for_other_runtime(best, runtime))
    screen(request, context, subject, timed, selection, "screened-guard", (0.55, 0.55))


def _record(
    found: Found,
    layers: Sequence[Keepable],
    noise: NoiseReport | None,
    untold: str,
    base: Attempt,
    evaluations: int,
    seconds: float,
    request: QuantizeRequest,
) -> Guard:
    limit = request.max_quality_drop
    by_name = {layer.name: layer for layer in layers}
    kept = [by_name[name] for name in found.best.kept]
    stopped = f"its time of {request.guard_time_s:g} s was spent" if found.out_of_time else None
    held = holds(found.best.drop, limit)
    plain = f"On the selection samples {base.made.option.name} loses {base.drop:.4f}"
    if held:
        named = _named([layer.path for layer in kept])
        why = f"{plain} with all layers in int8, and {found.best.drop:.4f} with {named} in float, within {limit:g}"
        if stopped:
            why += f"; fewer layers might do, but {stopped}"
    elif noise is None:
        why = f"{plain}, and its layers could not be ranked: {untold}"
    else:
        why = f"{plain}, more than {limit:g}; {_worst_words(noise.layers)}"
        if kept:
            why += f"; with {_count(len(kept))} in float it still loses {found.best.drop:.4f}"
        if found.trials:
            why += f", the least of {len(found.trials)} sets that were tried" if kept else "; no set tried loses less"
        if stopped:
            why += f"; {stopped}"
    return Guard(
        kept_in_float=[layer.path for layer in kept],
        float_bytes=sum(layer.size_bytes for layer in kept),
        evaluations=evaluations,
        quality_drop=found.best.drop,
        holds=held,
        seconds=seconds,
        stopped=stopped,
        why=why + ".",
    )


def _named(paths: Sequence[str]) -> str:
    """`layers a, b, c, d and 3 others`."""
    shown = f"layer{'s' if len(paths) != 1 else ''} {', '.join(paths[:NAMED])}"
    return shown if len(paths) <= NAMED else f"{shown} and {len(paths) - NAMED} others"


def _worst_words(layers: Sequence[LayerSqnr]) -> str:
    worst = ", ".join(f"{entry.layer.path} ({entry.alone_db:.1f} dB alone)" for entry in layers[:3])
    return f"most noise comes from {worst}"
