"""Select the range method of a program's activations by output SQNR."""

from __future__ import annotations

from collections.abc import Mapping

from omgoptim.techniques.quantize._onnx.qdq import Range, activation_parameters, set_scale, write_qdq
from omgoptim.techniques.quantize._ptq.calibration import outputs, size_of
from omgoptim.techniques.quantize._ptq.observers import Method, compute_ranges, observe_activations
from omgoptim.techniques.quantize._ptq.sqnr import sqnr_db
from omgoptim.techniques.quantize._ptq.state import (
    MIN_CHOICE_GAIN_DB,
    MIN_HELD_OUT,
    MIN_STEP_GAIN_DB,
    PtqSettings,
    PtqState,
)

METHODS: dict[bool, tuple[Method, ...]] = {
    False: ("minmax", "percentile", "mse"),
    True: ("minmax", "moving_average", "percentile", "mse", "entropy"),
}
"""Range methods that `auto` tries."""

TENSORS_TRIED = 64
"""Maximum number of activations whose range effort `best` chooses one by one, those first whose methods differ most."""

CHOOSING_MACS = 2e12
"""Limit of the multiply-accumulates of choosing ranges one by one: about a minute on two cores."""


def read_ranges(state: PtqState, settings: PtqSettings, notes: list[str]) -> PtqState:
    """Select the range method, for all tensors or for each, then observe ranges on all samples."""
    settings.progress("choosing ranges", 0.0)
    symmetric, data = settings.params.symmetric, settings.data
    wanted: Method = "minmax"
    if settings.params.range_method != "auto":
        methods = dict.fromkeys(state.ranges, settings.params.range_method)
    else:
        thorough = settings.params.rounding == "adaround"
        observed = observe_activations(state.model, data.fit, threads=settings.threads)
        found = {method: compute_ranges(observed, method, symmetric) for method in METHODS[thorough]}
        states = {method: settings.after(state, state.model, ranges) for method, ranges in found.items()}
        best = max(states, key=lambda name: states[name].sqnr_db)
        if states[best].sqnr_db > states[wanted].sqnr_db + MIN_CHOICE_GAIN_DB:
            wanted = best
        notes.append(f"Activation ranges by {wanted}: SQNR {states[wanted].sqnr_db:.1f} dB.")
        methods = dict.fromkeys(found[wanted], wanted)
        if thorough and sum(map(size_of, data.held)) >= MIN_HELD_OUT:
            methods = _choose_each(states[wanted], methods, found, settings, notes)
    everything = data.fit if data.fit[0] is data.held[0] else [*data.fit, *data.held]
    observed = observe_activations(state.model, everything, threads=settings.threads)
    ranges = {name: seen.range(methods[name], symmetric) for name, seen in observed.items()}
    return settings.after(state, state.model, ranges)


def _choose_each(
    state: PtqState,
    methods: dict[str, Method],
    found: Mapping[Method, Mapping[str, Range]],
    settings: PtqSettings,
    notes: list[str],
) -> dict[str, Method]:
    """Choose for each tensor the method whose range brings the outputs closest.

    Compared in a program with float biases, in which the scale of an activation can be set by itself.
    """
    symmetric, wanted, held = settings.params.symmetric, settings.data.wanted, settings.data.held
    simulated = write_qdq(state.model, settings.chosen, state.ranges, settings.params, float_biases=True)
    places = {name: at for name, at in activation_parameters(simulated).items() if name in methods}
    others = {name: [method for method in found if _differ(found[method][name], state.ranges[name])] for name in places}
    spread = {
        name: max((_spread(found[m][name], state.ranges[name]) for m in others[name]), default=0) for name in places
    }
    tried = sorted((name for name in others if others[name]), key=lambda name: -spread[name])[:TENSORS_TRIED]
    allowed = settings.evaluations(CHOOSING_MACS, sum(map(size_of, held)))
    tried = [name for at, name in enumerate(tried) if sum(len(others[n]) for n in tried[: at + 1]) <= allowed]
    chosen = dict(methods)
    best = sqnr_db(wanted, outputs(simulated, held, settings.threads))
    for index, name in enumerate(tried):
        settings.progress("choosing ranges", index / len(tried))
        for method in others[name]:
            set_scale(simulated, places[name], found[method][name], symmetric)
            level = sqnr_db(wanted, outputs(simulated, held, settings.threads))
            if level > best + MIN_STEP_GAIN_DB:
                best, chosen[name] = level, method
        set_scale(simulated, places[name], found[chosen[name]][name], symmetric)
    refined = settings.after(state, state.model, {name: found[method][name] for name, method in chosen.items()})
    changed = sum(chosen[name] != methods[name] for name in chosen)
    if not changed or refined.sqnr_db <= state.sqnr_db + MIN_CHOICE_GAIN_DB:
        return methods
    notes.append(f"Range methods selected per tensor for {changed} tensors: SQNR {refined.sqnr_db:.1f} dB.")
    return chosen


def _differ(one: Range, other: Range) -> bool:
    width = max(one[1] - one[0], other[1] - other[0])
    return max(abs(one[0] - other[0]), abs(one[1] - other[1])) > 0.01 * width


def _spread(bounds: Range, current: Range) -> float:
    width = max(current[1] - current[0], 1e-30)
    return abs((bounds[1] - bounds[0]) - width) / width
