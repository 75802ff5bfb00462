"""Rank selection for each layer under the requested target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from omgoptim.measure.size import count_params
from omgoptim.reports import Skip
from omgoptim.requests.factorize import Factorization
from omgoptim.techniques.factorize._low_rank import factor_forms as forms
from omgoptim.techniques.factorize._low_rank.problem import Form, Option, Problem
from omgoptim.techniques.factorize._low_rank.rank_allocation import RankChoice, pareto, share_out, with_energy, within
from omgoptim.techniques.factorize._low_rank.rank_timing import measure_times
from omgoptim.techniques.reconstruction.rows import DenseLayer
from omgoptim.techniques.registry import ModuleRun

SMALLEST_SHARE = 1e-9
"""Lower bound of the kept share before its logarithm: below float32's precision of an energy."""

RUNGS = 256
"""Maximum options of a layer in the allocation."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Candidate ranks of one layer."""

    params: int
    """Parameters of the dense layer."""
    energy: float
    """Energy of its output, in the units of the options' errors."""
    plain_energy: float
    """Energy with all outputs weighted equally: E|W x|²."""
    options: tuple[Option, ...]
    """Pareto-optimal options in size and error, the smallest first; the full rank is among them."""
    comparable: bool
    """Whether errors are those of the model's outputs, and so comparable between layers."""

    @property
    def smaller(self) -> list[Option]:
        return [option for option in self.options if option.params < self.params]


def forms_of(layer: DenseLayer, convolution: str) -> tuple[Form, ...]:
    """Return the forms that a layer may take."""
    if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1):
        return ("linear",)
    if convolution in ("tucker2", "spatial"):
        return (convolution,)  # type: ignore[return-value]
    return "spatial", "tucker2"


def ladder_of_layer(layer: DenseLayer, problem: Problem, params: Factorization) -> Ladder:
    """Return a layer's options under the request's target, of the allowed forms."""
    kinds = forms_of(layer, params.convolution)
    if params.rank is not None:
        options = [forms.option_at(problem, kind, params.rank) for kind in kinds]
        options = [min(options, key=lambda option: (option.error, option.params))]
    else:
        options = pareto([option for kind in kinds for option in forms.ladder(problem, kind, params.round_to)])
    plain = replace(problem, influence=None, roots={}).energy
    return Ladder(layer.weight.numel(), problem.energy, plain, tuple(options), problem.influence is not None)


def choose(
    module: nn.Module,
    layers: Mapping[str, DenseLayer],
    ladders: Mapping[str, Ladder],
    params: Factorization,
    run: ModuleRun,
    skipped: list[Skip],
) -> dict[str, Option]:
    """Return the option of each layer by path, in the order of the ladders; dense layers go to `skipped`.

    Raises:
        TechniqueError: a target that is out of reach.
    """
    chosen: dict[str, Option] = {}
    compression = params.compression
    for path, ladder in ladders.items():
        if compression is not None:
            break
        option, wanted = _of_one(ladder, params)
        if option is not None and option.params < ladder.params:
            chosen[path] = option
        else:
            skipped.append(Skip(path=path, reason=_no_smaller(layers[path], ladder, option, wanted)))
    if compression is None:
        return chosen
    shared = _layered(module, layers, ladders, params, run, skipped)
    total = count_params(module)[0]
    elsewhere = total - sum(layer.params for layer in shared.values())
    chosen = share_out(shared, elsewhere, total, compression)
    whole = "kept dense: factorizing other layers loses less at the same size"
    skipped += [Skip(path=path, reason=whole) for path in shared if path not in chosen]
    return {path: chosen[path] for path in ladders if path in chosen}


def _of_one(ladder: Ladder, params: Factorization) -> tuple[Option | None, str]:
    """Return the option under a target for each layer alone, and the target in words."""
    if params.rank is not None:
        return ladder.options[0], f"rank {params.rank}"
    if params.energy is not None:
        return with_energy(ladder.options, params.energy, ladder.energy), f"{params.energy:.1%} of the energy"
    ratio = params.rank_ratio or 0.5
    return within(ladder.options, int(ratio * ladder.params)), f"at most {ratio:.0%} of its weights"


def _no_smaller(layer: DenseLayer, ladder: Ladder, option: Option | None, wanted: str) -> str:
    if option is None:
        least = f"the smallest has {ladder.options[0].params:,}" if ladder.options else "there is none"
        return f"none of its ranks has {wanted}: {least} of {ladder.params:,} weights"
    bound = ""
    if isinstance(layer, nn.Linear):
        below = ladder.params / (layer.in_features + layer.out_features)
        bound = f"; only a rank below {below:.1f} is smaller"
    return f"{wanted} would make it no smaller: {option} has {option.params:,} weights, it has {ladder.params:,}{bound}"


def _layered(
    module: nn.Module,
    layers: Mapping[str, DenseLayer],
    ladders: Mapping[str, Ladder],
    params: Factorization,
    run: ModuleRun,
    skipped: list[Skip],
) -> dict[str, RankChoice]:
    """Return the layers with a smaller, and where required faster, option."""
    comparable = all(ladder.comparable for ladder in ladders.values())
    found: dict[str, RankChoice] = {}
    for path, ladder in ladders.items():
        options = _thinned(ladder.smaller)
        if not options:
            skipped.append(Skip(path=path, reason=_no_smaller(layers[path], ladder, ladder.options[0], "any rank")))
            continue
        losses = tuple(option.error if comparable else _share_lost(option, ladder) for option in options)
        found[path] = RankChoice(ladder.params, tuple(options), losses)
    return found if params.per == "bytes" else measure_times(module, found, run, skipped)


def _share_lost(option: Option, ladder: Ladder) -> float:
    """Return -log of the share of its energy that a layer keeps.

    The sum over layers corresponds to the product of all shares. For layers whose effects on the model are unknown: a
    plain sum of the lost shares would give up whole layers.
    """
    lost = option.error / ladder.energy if ladder.energy > 0 else 0.0
    return -math.log(max(1.0 - lost, SMALLEST_SHARE))


def _thinned(options: list[Option]) -> list[Option]:
    step = -(-len(options) // RUNGS)
    return options[::-1][::step][::-1]
