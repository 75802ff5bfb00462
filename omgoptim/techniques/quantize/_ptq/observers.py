"""Range observers: activation ranges from one pass over the calibration data, and the choice of a method.

An observer takes the same memory whatever the data: extremes, extremes per batch, and a histogram whose span doubles
when a value falls outside (pairs of bins are merged), so that nothing is read twice.

    minmax          smallest and largest value
    moving_average  mean over batches of the smallest and largest value (arXiv:1712.05877)
    percentile      the range that leaves `CLIPPED_FRACTION` of the values out at either end
    mse             the range of least squared rounding and clipping error at 8 bits
    entropy         the range whose quantized distribution has the least Kullback-Leibler divergence from that of the
                    values (as in TensorRT, here from either end)

A range always holds 0, as padding and ReLU need it. `auto` selects the method by the output's SQNR.
Source: arXiv:2004.09602 compares the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from omgoptim.errors import DataError
from omgoptim.techniques.quantize._onnx.qdq import (
    Range,
    activation_parameters,
    quantization_parameters,
    set_scale,
    write_qdq,
)
from omgoptim.techniques.quantize._ptq.calibration import ActivationReader, Batch, float_tensors, outputs, size_of
from omgoptim.techniques.quantize._ptq.state import (
    MIN_CHOICE_GAIN_DB,
    MIN_HELD_OUT,
    MIN_STEP_GAIN_DB,
    PtqSettings,
    PtqState,
    sqnr_db,
)

Method = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]

BINS = 8192
"""Histogram bins over [-span, span]: 16 to 32 per step of an 8-bit range, whatever the span was at the start."""

CLIPPED_FRACTION = 1e-5
"""Fraction of the values that `percentile` leaves out at each end: ONNX Runtime's default percentile is 99.999."""

RANGE_FRACTIONS = np.concatenate([np.linspace(1.0, 0.8, 21), np.linspace(0.78, 0.2, 30)])
"""Fractions of an extreme tried as a bound. Chosen: steps of 1 % near the extreme, 2 % below; more cost time."""

METHODS: dict[bool, tuple[Method, ...]] = {
    False: ("minmax", "percentile", "mse"),
    True: ("minmax", "moving_average", "percentile", "mse", "entropy"),
}
"""Range methods that `auto` tries."""

TENSORS_TRIED = 64
"""Maximum activations whose range effort `best` chooses one by one, most different first. Chosen by time."""

RANGE_SEARCH_MACS = 2e12
"""Limit of the multiply-accumulates of choosing ranges one by one. Chosen: about a minute on two cores."""


@dataclass(slots=True)
class RangeObserver:
    """Range observer of one tensor."""

    low: float = 0.0
    high: float = 0.0
    batch_lows: list[float] = field(default_factory=list)
    batch_highs: list[float] = field(default_factory=list)
    span: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: NDArray[np.float32], *, histogram: bool, same_batch: bool = False) -> bool:
        """Observe the values of one slice if all are finite; `same_batch`: it continues the last slice's batch."""
        if values.size == 0:
            return True
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low) or not np.isfinite(high):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        if same_batch and self.batch_lows:
            self.batch_lows[-1], self.batch_highs[-1] = min(self.batch_lows[-1], low), max(self.batch_highs[-1], high)
        else:
            self.batch_lows.append(low)
            self.batch_highs.append(high)
        peak = max(-low, high)
        if not histogram or peak == 0:
            if histogram and self.span:
                self.counts[BINS // 2] += values.size
            return True
        if self.span == 0:
            self.span = peak
        while peak > self.span:
            self._double()
        bins = ((values.reshape(-1) + self.span) * (BINS / 2 / self.span)).astype(np.int32)
        self.counts += np.bincount(np.clip(bins, 0, BINS - 1), minlength=BINS)
        return True

    def _double(self) -> None:
        pairs = self.counts.reshape(-1, 2).sum(1)
        self.counts = np.zeros(BINS, np.int64)
        self.counts[BINS // 4 : BINS // 4 + BINS // 2] = pairs
        self.span *= 2

    def distribution(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the centres of the bins that are not empty, ascending, and their counts."""
        centres = (np.arange(BINS) + 0.5) * (2 * self.span / BINS) - self.span
        occupied = self.counts > 0
        return np.clip(centres[occupied], self.low, self.high), self.counts[occupied].astype(np.float64)

    def range(self, method: Method, symmetric: bool = False) -> Range:
        """Return the range by a method; (0, 0) for a tensor that was always 0."""
        if method == "moving_average" and self.batch_lows:
            return min(0.0, float(np.mean(self.batch_lows))), max(0.0, float(np.mean(self.batch_highs)))
        if method in ("minmax", "moving_average") or self.span == 0:
            return self.low, self.high
        values, counts = self.distribution()
        if method == "percentile":
            return percentile_range(values, counts)
        cost = squared_error if method == "mse" else divergence
        return search_range(values, counts, (self.low, self.high), symmetric, cost)


def observe_activations(
    model: ModelProto, batches: Sequence[Batch], *, histogram: bool = True, threads: int = 1
) -> dict[str, RangeObserver]:
    """Run the float program once over the batches.

    Raises:
        DataError: a value inside the network is NaN or infinite, with the tensor's name.
    """
    names = float_tensors(model)
    observers = {name: RangeObserver() for name in names}
    reader = ActivationReader(model, names, exact=True, threads=threads)
    for batch in batches:
        for index, (_, values) in enumerate(reader.slices([batch])):
            for name, array in values.items():
                if not observers[name].add(array, histogram=histogram, same_batch=index > 0):
                    raise not_finite(f"activation '{name}'")
    return observers


def not_finite(activation: str) -> DataError:
    """Return the error for an activation with NaN or infinity."""
    return DataError(
        f"{activation} is not finite on the calibration data",
        "no quantization range can be calibrated from it",
        "look for a division by zero or an overflow, or remove the samples that cause it",
    )


def compute_ranges(observers: Mapping[str, RangeObserver], method: Method, symmetric: bool = False) -> dict[str, Range]:
    """Return the range of every tensor by one method."""
    return {name: observer.range(method, symmetric) for name, observer in observers.items()}


def percentile_range(values: NDArray[np.float64], counts: NDArray[np.float64]) -> Range:
    """Return the range that leaves `CLIPPED_FRACTION` of the values out at each end; it holds 0."""
    below = np.cumsum(counts) / counts.sum()
    low = values[np.searchsorted(below, CLIPPED_FRACTION, side="right")]
    high = values[min(int(np.searchsorted(below, 1 - CLIPPED_FRACTION)), len(values) - 1)]
    return min(0.0, float(low)), max(0.0, float(high))


def search_range(
    values: NDArray[np.float64],
    counts: NDArray[np.float64],
    bounds: Range,
    symmetric: bool,
    cost: Callable[[NDArray[np.float64], NDArray[np.float64], Range, bool], float],
) -> Range:
    """Search the range of least cost: each end is shrunk in turn, twice; both at once if symmetric."""
    if symmetric:
        peak = max(-bounds[0], bounds[1])
        costs = [cost(values, counts, (-peak * f, peak * f), True) for f in RANGE_FRACTIONS]
        best = peak * float(RANGE_FRACTIONS[int(np.argmin(costs))])
        return -best, best
    low, high = bounds
    for _ in range(2):
        if high > 0:
            costs = [cost(values, counts, (low, bounds[1] * f), False) for f in RANGE_FRACTIONS]
            high = bounds[1] * float(RANGE_FRACTIONS[int(np.argmin(costs))])
        if low < 0:
            costs = [cost(values, counts, (bounds[0] * f, high), False) for f in RANGE_FRACTIONS]
            low = bounds[0] * float(RANGE_FRACTIONS[int(np.argmin(costs))])
        else:
            break
    return low, high


def squared_error(values: NDArray[np.float64], counts: NDArray[np.float64], bounds: Range, symmetric: bool) -> float:
    """Return the sum of squared errors of values that are rounded to the range's integers and clipped."""
    scale, lowest, highest = _grid(bounds, symmetric)
    rounded = np.clip(np.rint(values / scale), lowest, highest) * scale
    return float(np.dot(counts, np.square(values - rounded)))


def divergence(values: NDArray[np.float64], counts: NDArray[np.float64], bounds: Range, symmetric: bool) -> float:
    """Return the Kullback-Leibler divergence of the clipped values' distribution P from that of the quantized ones Q.

    Clipped values count for the outermost bins of P and not for Q; Q spreads the mass of an integer evenly over its
    bins that are not empty.
    """
    scale, lowest, highest = _grid(bounds, symmetric)
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    if symmetric:
        low, high = min(low, -high), max(-low, high)
    inside = (values >= low) & (values <= high)
    if not inside.any():
        return np.inf
    p = counts[inside].copy()
    integers = np.clip(np.rint(values[inside] / scale), lowest, highest).astype(np.int64) - lowest
    mass = np.bincount(integers, weights=p)
    q = (mass / np.maximum(np.bincount(integers), 1))[integers]
    p[0] += counts[values < low].sum()
    p[-1] += counts[values > high].sum()
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _grid(bounds: Range, symmetric: bool) -> tuple[float, int, int]:
    """Return the step of a range, and its least and greatest integer relative to the zero point."""
    scale, zero = quantization_parameters(bounds, symmetric)
    return (scale, -127, 127) if symmetric else (scale, -zero, 255 - zero)


def read_ranges(state: PtqState, settings: PtqSettings, notes: list[str]) -> PtqState:
    """Select the range method, for all tensors or for each, then observe ranges on all samples."""
    settings.progress("choosing ranges", 0.0)
    symmetric, data = settings.params.symmetric, settings.data
    selected: Method = "minmax"
    if settings.params.range_method != "auto":
        methods = dict.fromkeys(state.ranges, settings.params.range_method)
    else:
        thorough = settings.params.rounding == "adaround"
        observers = observe_activations(state.model, data.fit, threads=settings.threads)
        ranges_by_method = {method: compute_ranges(observers, method, symmetric) for method in METHODS[thorough]}
        states = {
            method: settings.with_program(state, state.model, ranges) for method, ranges in ranges_by_method.items()
        }
        best = max(states, key=lambda name: states[name].sqnr_db)
        if states[best].sqnr_db > states[selected].sqnr_db + MIN_CHOICE_GAIN_DB:
            selected = best
        notes.append(f"Range method {selected}: SQNR {states[selected].sqnr_db:.1f} dB.")
        methods = dict.fromkeys(ranges_by_method[selected], selected)
        if thorough and sum(map(size_of, data.held_out)) >= MIN_HELD_OUT:
            methods = _choose_each(states[selected], methods, ranges_by_method, settings, notes)
    everything = data.fit if data.fit[0] is data.held_out[0] else [*data.fit, *data.held_out]
    observers = observe_activations(state.model, everything, threads=settings.threads)
    ranges = {name: observer.range(methods[name], symmetric) for name, observer in observers.items()}
    return settings.with_program(state, state.model, ranges)


def _choose_each(
    state: PtqState,
    methods: dict[str, Method],
    ranges_by_method: Mapping[Method, Mapping[str, Range]],
    settings: PtqSettings,
    notes: list[str],
) -> dict[str, Method]:
    """Choose for each tensor the method whose range brings the outputs closest.

    Compared in a program with float biases, in which the scale of an activation can be set by itself.
    """
    symmetric, reference, held_out = settings.params.symmetric, settings.data.reference_outputs, settings.data.held_out
    simulated = write_qdq(state.model, settings.chosen, state.ranges, settings.params, float_biases=True)
    parameters = {name: at for name, at in activation_parameters(simulated).items() if name in methods}
    alternatives = {
        name: [method for method in ranges_by_method if _differ(ranges_by_method[method][name], state.ranges[name])]
        for name in parameters
    }
    spread = {
        name: max((_spread(ranges_by_method[m][name], state.ranges[name]) for m in alternatives[name]), default=0)
        for name in parameters
    }
    tried = sorted((name for name in alternatives if alternatives[name]), key=lambda name: -spread[name])[
        :TENSORS_TRIED
    ]
    allowed = settings.affordable_runs(RANGE_SEARCH_MACS, sum(map(size_of, held_out)))
    tried = [name for at, name in enumerate(tried) if sum(len(alternatives[n]) for n in tried[: at + 1]) <= allowed]
    chosen = dict(methods)
    best = sqnr_db(reference, outputs(simulated, held_out, settings.threads))
    for index, name in enumerate(tried):
        settings.progress("choosing ranges", index / len(tried))
        for method in alternatives[name]:
            set_scale(simulated, parameters[name], ranges_by_method[method][name], symmetric)
            sqnr = sqnr_db(reference, outputs(simulated, held_out, settings.threads))
            if sqnr > best + MIN_STEP_GAIN_DB:
                best, chosen[name] = sqnr, method
        set_scale(simulated, parameters[name], ranges_by_method[chosen[name]][name], symmetric)
    refined = settings.with_program(
        state, state.model, {name: ranges_by_method[method][name] for name, method in chosen.items()}
    )
    changed = sum(chosen[name] != methods[name] for name in chosen)
    if not changed or refined.sqnr_db <= state.sqnr_db + MIN_CHOICE_GAIN_DB:
        return methods
    notes.append(f"Range method selected separately for {changed} tensors: SQNR {refined.sqnr_db:.1f} dB.")
    return chosen


def _differ(first: Range, second: Range) -> bool:
    width = max(first[1] - first[0], second[1] - second[0])
    return max(abs(first[0] - second[0]), abs(first[1] - second[1])) > 0.01 * width


def _spread(bounds: Range, current: Range) -> float:
    width = max(current[1] - current[0], 1e-30)
    return abs((bounds[1] - bounds[0]) - width) / width
