"""Speed of each level of compression on the engine of the result, measured before anything is trained.

Each level is pruned without training, quantized as quantization alone chose it, and timed in one launch beside the
original. Times of an int8 engine fall in steps of its kernels' widths, so a level that is no better than a shallower
one is not worth a training.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from omgoptim.errors import OmgoptimError
from omgoptim.hardware import LoadMeter, other_load
from omgoptim.measure.timing import SCREENING_PLAN, Timing, time_artifacts
from omgoptim.models.manifest import Manifest
from omgoptim.operations.context import RunContext, Stage
from omgoptim.operations.datasets import one_sample
from omgoptim.operations.float_program import float_program
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.optimization.points import StepResult
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.selection import Preference
from omgoptim.operations.timing import OVERLOADED
from omgoptim.requests import Params
from omgoptim.requests.factorize import Svd
from omgoptim.requests.prune import Structured
from omgoptim.requests.quantize import Bf16, Dynamic, Fp16, Fp32, Static
from omgoptim.techniques.quantize._ptq.state import apply_preset
from omgoptim.techniques.registry import ModuleRun, apply_to_module

LEVELS = (0.5, 0.75, 0.25, 0.625, 0.375, 0.875)
"""Levels in the order in which they are measured while time is left: the usual one, then its bisections."""

TILE = 16
"""Multiple of widths that is compared with the default: int8 kernels compute whole tiles of channels."""

BETTER = 1.03
"""Merit of a level over that of every shallower one, from which it is worth a training. Chosen: less is within the
interval of a measurement."""

FACTORIZED = 1.5
"""Compression by factorization whose merit is measured at the first level."""

CALIBRATION = 32
"""Samples that an untrained network is quantized with; its quality is not read."""

EAGER_S, EAGER_PAIRS = 1.0, 30
"""Seconds and most pairs of calls of a comparison in torch."""

QUANTIZED: dict[str, Params] = {
    "static": apply_preset(Static(calibration_samples=CALIBRATION), "fast"),
    "dynamic": Dynamic(),
    "bf16": Bf16(),
    "fp16": Fp16(),
    "fp32": Fp32(),
}
"""Technique by scheme, in its fastest form: the speed is that of any other."""


@dataclass(frozen=True, slots=True)
class LevelSpeeds:
    """Speedups over the original by level, the shallowest first; level 0 is quantization alone.

    None where it could not be measured, as on a busy machine.
    """

    seconds: float = 0.0
    levels: list[float] = field(default_factory=list)
    eager: list[float | None] = field(default_factory=list)
    """Speedups in torch, in which the step of a level is measured."""
    quantized: list[float | None] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Sizes of the quantized artifacts, in bytes."""
    round_to: int | None = None
    """Multiple of the widths that was better at the first level; None for the default of each technique."""
    factorized: float | None = None
    """Speed of the factorized and quantized first level over that of the quantized one."""
    factorized_size: float | None = None
    """Size of the quantized first level over that of the factorized one."""

    def expected_eager(self, level: float) -> float | None:
        """Return the expected speedup in torch of the step of a level."""
        return _between(self.levels, self.eager, level)

    def expected_quantized(self, level: float) -> float | None:
        """Return the expected speedup of a level after quantization."""
        return _between(self.levels, self.quantized, level)

    def edges(self, preference: Preference) -> list[float]:
        """Return the levels whose merit exceeds that of every shallower one."""
        known = all(speed is not None for speed in self.quantized)
        best, found = 0.0, []
        for level, speed, size in zip(self.levels, self.quantized, self.sizes, strict=True):
            merit = preference.merit_of(speed or 1.0, 1 / size) if known else 1 / size
            if merit > BETTER * best:
                best = merit
                found += [level] if level > 0 else []
        return found

    def next_level(self, low: float, high: float, preference: Preference) -> float | None:
        """Return the level to try between two others; None where none between them is worth it."""
        middle = (low + high) / 2
        if not any(low < level < high for level in self.levels):
            return round(middle, 3)
        inside = [level for level in self.edges(preference) if low < level < high]
        return min(inside, key=lambda level: abs(level - middle), default=None)

    def factorizing_pays(self, preference: Preference) -> bool:
        """Return whether a factorized network is expected to have more merit than one that is not."""
        if self.factorized is None or self.factorized_size is None:
            return False
        return preference.merit_of(self.factorized, self.factorized_size) > BETTER


def measure_levels(
    loaded: LoadedModel, alone: StepResult, preference: Preference, seed: int, stage: Stage, limit_s: float
) -> LevelSpeeds:
    """Prune, quantize and time a network at every level that `limit_s` leaves time for; the first at least.

    Args:
        loaded: the original.
        alone: quantization of the original, whose scheme and engine are used.
        preference: decides between the default multiple of the widths and the tile of int8 kernels.
        seed: of the run.
        stage: part of the run that this is.
        limit_s: seconds for all levels.
    """
    began = time.monotonic()
    chosen = next((one for one in alone.run.report.candidates if one.status == "chosen"), None)
    params = QUANTIZED.get(chosen.scheme) if chosen else None
    if loaded.module is None or chosen is None or params is None:
        return LevelSpeeds(time.monotonic() - began)
    probe = _Probe(loaded, stage.context, CandidateSpec(params, chosen.runtime), seed)
    folders, eager = {0.0: alone.artifact}, {0.0: 1.0 if loaded.device == "cpu" else None}
    factorized = first = None
    if isinstance(params, Static):
        replace(stage, doing="comparing multiples of the widths untrained").report(0.0)
        first = probe.better_multiple(loaded.module, preference)
    round_to = first.round_to if first else None
    compared = time.monotonic() - began
    for number, level in enumerate(LEVELS):
        spent = time.monotonic() - began - compared
        if number and compared + spent * (number + 2) / number > limit_s:  # the launch takes about as long as a level
            break
        replace(stage, doing=f"measuring level {level:.0%} untrained").report(number / len(LEVELS))
        try:
            narrowed = first if first and number == 0 else probe.narrowed(loaded.module, level, round_to)
            folders[level], eager[level] = narrowed.artifact, probe.eager_ratio(narrowed.module)
        except OmgoptimError:  # too high for this model, or no export: the step itself reports why
            continue
        if number == 0:
            factorized = probe.factorized(narrowed.module)
    return replace(_timed(probe, folders, eager, factorized, began), round_to=round_to)


@dataclass(frozen=True, slots=True)
class _Narrowed:
    """An untrained network without some of its channels, and its quantized artifact."""

    round_to: int | None
    module: nn.Module
    artifact: Path


@dataclass(frozen=True, slots=True)
class _Probe:
    """Builds and quantizes untrained networks."""

    loaded: LoadedModel
    context: RunContext
    spec: CandidateSpec
    seed: int

    def narrowed(self, module: nn.Module, level: float, round_to: int | None) -> _Narrowed:
        """Remove a fraction `level` of the channels from a copy of a module, and quantize it."""
        narrow = self.changed(module, Structured(pruning_ratio=level, round_to=round_to, reconstruct=False))
        return _Narrowed(round_to, narrow, self.quantized(narrow, f"{level:g} {round_to}"))

    def better_multiple(self, module: nn.Module, preference: Preference) -> _Narrowed | None:
        """Return the first level with the multiple of widths that the preference puts first.

        None where it cannot be made. The default multiple, where the machine is overloaded.
        """
        try:
            default, tiled = (self.narrowed(module, LEVELS[0], round_to) for round_to in (None, TILE))
        except OmgoptimError:  # the level itself reports why
            return None
        speeds = self.speeds([default.artifact, tiled.artifact])
        sizes = [Manifest.read(one.artifact).size_bytes for one in (default, tiled)]
        if speeds[0] is None or speeds[1] is None:
            return default
        return tiled if preference.merit_of(speeds[1] / speeds[0], sizes[0] / sizes[1]) > BETTER else default

    def speeds(self, artifacts: Sequence[Path]) -> list[float | None]:
        """Time artifacts in one launch beside the original; None for each on an overloaded machine."""
        unknown: list[float | None] = [None] * len(artifacts)
        if other_load() > OVERLOADED:
            return unknown
        with self.context.measuring():
            meter = LoadMeter()
            timings = time_artifacts([self.loaded.baseline, *artifacts], self.loaded.bench, SCREENING_PLAN, self.seed)
            quiet = meter.load() <= OVERLOADED
        if not quiet:
            return unknown
        return [one.speedup.value if isinstance(one, Timing) and one.speedup else None for one in timings[1:]]

    def changed(self, module: nn.Module, params: Params) -> nn.Module:
        """Return a copy of a module with a technique applied."""
        loaded, copied = self.loaded, copy.deepcopy(module).eval()
        scratch = self.context.work / "levels" / "technique"
        scratch.mkdir(parents=True, exist_ok=True)
        run = ModuleRun(
            loaded.signature, loaded.samples("calibration", CALIBRATION), _no_loss, module, scratch, self.seed,
            loaded.bench.threads,
        )  # fmt: skip
        apply_to_module(copied, params, run)
        return copied.eval()

    def quantized(self, module: nn.Module, name: str) -> Path:
        """Save a network as it would be delivered."""
        changed = replace(self.loaded, module=module, program=None)
        program = float_program(changed, self.context, "levels/float")
        calibration = changed.samples("calibration", CALIBRATION)
        built = CandidateBuilder(self.context, changed, program, calibration, self.seed).build(self.spec)
        if built.folder is None:
            raise built.error or OmgoptimError("the network could not be quantized")
        folder = self.context.work / "levels" / name
        os.replace(built.folder, folder)
        return folder

    def factorized(self, module: nn.Module) -> Path | None:
        """Save a network with low-rank factors in place of its weights; None where that changes nothing."""
        try:
            factors = Svd(target_compression=FACTORIZED)
            return self.quantized(self.changed(module, factors), "factorized")
        except OmgoptimError:  # no layer of it is worth factorizing
            return None

    def eager_ratio(self, module: nn.Module) -> float | None:
        """Return the original's time in torch over this one's, in this process; None on another device."""
        original = self.loaded.module
        if self.loaded.device != "cpu" or original is None or other_load() > OVERLOADED:
            return None
        args, kwargs = one_sample(self.loaded)
        threads = torch.get_num_threads()
        ratios: list[float] = []
        with self.context.measuring(), torch.inference_mode():
            torch.set_num_threads(self.loaded.bench.threads)
            try:
                began = time.perf_counter()
                while len(ratios) < 3 or (len(ratios) < EAGER_PAIRS and time.perf_counter() - began < EAGER_S):
                    ratios.append(_seconds(original, args, kwargs) / _seconds(module, args, kwargs))
            finally:
                torch.set_num_threads(threads)
        return statistics.median(ratios)


def _timed(
    probe: _Probe,
    folders: dict[float, Path],
    eager: dict[float, float | None],
    factorized: Path | None,
    began: float,
) -> LevelSpeeds:
    """Time the quantized networks in one launch beside the original; not on an overloaded machine."""
    levels = sorted(folders)
    artifacts = [folders[level] for level in levels] + ([factorized] if factorized else [])
    sizes = [Manifest.read(artifact).size_bytes for artifact in artifacts]
    unknown: list[float | None] = [None] * len(artifacts)
    speeds = probe.speeds(artifacts) if len(levels) > 1 else unknown
    ratio = size_ratio = None
    if factorized and LEVELS[0] in levels:
        first, last = levels.index(LEVELS[0]), len(levels)
        size_ratio = sizes[first] / sizes[last]
        whole, parts = speeds[first], speeds[last]
        ratio = parts / whole if parts and whole else None
    return LevelSpeeds(
        seconds=time.monotonic() - began,
        levels=levels,
        eager=[eager[level] for level in levels],
        quantized=speeds[: len(levels)],
        sizes=sizes[: len(levels)],
        factorized=ratio,
        factorized_size=size_ratio,
    )


def _between(levels: Sequence[float], speeds: Sequence[float | None], level: float) -> float | None:
    """Return the speedup at a level, its latency interpolated between its neighbours; None past the deepest known."""
    known = [(at, 1 / speed) for at, speed in zip(levels, speeds, strict=True) if speed]
    if not known or level > known[-1][0]:
        return None
    return float(1 / np.interp(level, [at for at, _ in known], [latency for _, latency in known]))


def _seconds(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    start = time.perf_counter()
    module(*args, **kwargs)
    return time.perf_counter() - start


def _no_loss(_outputs: Any, _target: Any) -> torch.Tensor:
    raise OmgoptimError("this importance needs no loss")
