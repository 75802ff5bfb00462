"""Factorization of a module: select layers, choose their ranks under the requested target, replace them by blocks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.reports import Change, Skip
from omgoptim.requests.factorize import Factorization
from omgoptim.techniques.factorize._low_rank import factor_forms as forms
from omgoptim.techniques.factorize._low_rank.factor_forms import solve
from omgoptim.techniques.factorize._low_rank.layer_selection import candidates, factorizable
from omgoptim.techniques.factorize._low_rank.problem import (
    Form,
    Problem,
    RankOption,
    block_of,
    moments_refusal,
    problem_of,
    product_of,
    replace_layer,
    weight_of,
)
from omgoptim.techniques.factorize._low_rank.rank_allocation import (
    RankChoice,
    allocate_ranks,
    measure_times,
    pareto,
    with_energy,
    within_params,
)
from omgoptim.techniques.factorize._low_rank.second_moments import (
    MAX_MOMENT_INPUTS,
    fan_in,
    input_moments,
    output_influence,
)
from omgoptim.techniques.factorize._low_rank.sequential_solve import solve_in_order
from omgoptim.techniques.reconstruction.inputs import DenseLayer
from omgoptim.techniques.registry import ModuleRun, Outcome, Refusal

MIN_SHARE = 1e-9
"""Lower bound of the kept share before its logarithm: below float32's precision of an energy."""

MAX_OPTIONS = 256
"""Maximum options of a layer in the allocation: steps of 0.4 % of its ranks. Chosen: more cost time and memory."""


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """Candidate ranks of one layer."""

    params: int
    """Parameters of the dense layer."""
    energy: float
    """Energy of its output, in the units of the options' errors."""
    plain_energy: float
    """Energy with all outputs weighted equally: E|W x|²."""
    options: tuple[RankOption, ...]
    """Pareto-optimal options in size and error, the smallest first; the full rank is among them."""
    comparable: bool
    """True if errors are those of the model's outputs, and so comparable between layers."""

    @property
    def smaller(self) -> list[RankOption]:
        return [option for option in self.options if option.params < self.params]


def forms_of(layer: DenseLayer, convolution: str) -> tuple[Form, ...]:
    """Return the forms that a layer may take."""
    if isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1):
        return ("linear",)
    if convolution in ("tucker2", "spatial"):
        return (convolution,)  # type: ignore[return-value]
    return "spatial", "tucker2"


def options_of_layer(layer: DenseLayer, problem: Problem, params: Factorization) -> LayerOptions:
    """Return a layer's options under the request's target, of the allowed forms."""
    kinds = forms_of(layer, params.convolution)
    if params.rank is not None:
        options = [forms.option_at(problem, kind, params.rank) for kind in kinds]
        options = [min(options, key=lambda option: (option.error, option.params))]
    else:
        options = pareto([option for kind in kinds for option in forms.rank_options(problem, kind, params.round_to)])
    plain = replace(problem, influence=None, roots={}).energy
    return LayerOptions(layer.weight.numel(), problem.energy, plain, tuple(options), problem.influence is not None)


def choose_ranks(
    module: nn.Module,
    layers: Mapping[str, DenseLayer],
    layer_options: Mapping[str, LayerOptions],
    params: Factorization,
    run: ModuleRun,
    skipped: list[Skip],
) -> dict[str, RankOption]:
    """Return the option of each layer by path, in the same order; dense layers go to `skipped`.

    Raises:
        TechniqueError: the target cannot be reached.
    """
    chosen: dict[str, RankOption] = {}
    compression = params.compression
    for path, candidate in layer_options.items():
        if compression is not None:
            break
        option, target = _option_for_layer(candidate, params)
        if option is not None and option.params < candidate.params:
            chosen[path] = option
        else:
            skipped.append(_no_smaller(layers[path], candidate, option, target).skip(path))
    if compression is None:
        return chosen
    choices = _rank_choices(module, layers, layer_options, params, run, skipped)
    total = count_params(module)[0]
    elsewhere = total - sum(layer.params for layer in choices.values())
    chosen = allocate_ranks(choices, elsewhere, total, compression)
    dense = Refusal("kept dense: factorizing other layers loses less at the same size", "no_benefit")
    skipped += [dense.skip(path) for path in choices if path not in chosen]
    return {path: chosen[path] for path in layer_options if path in chosen}


def _option_for_layer(candidate: LayerOptions, params: Factorization) -> tuple[RankOption | None, str]:
    """Return the option under a target for each layer alone, and the target in words."""
    if params.rank is not None:
        return candidate.options[0], f"rank {params.rank}"
    if params.energy is not None:
        return with_energy(candidate.options, params.energy, candidate.energy), f"{params.energy:.1%} of the energy"
    ratio = params.rank_ratio or 0.5
    return within_params(candidate.options, int(ratio * candidate.params)), f"at most {ratio:.0%} of its weights"


def _no_smaller(layer: DenseLayer, candidate: LayerOptions, option: RankOption | None, target: str) -> Refusal:
    if option is None:
        least = f"the smallest needs {candidate.options[0].params:,}" if candidate.options else "none is smaller"
        return Refusal(f"no rank has {target}: {least} of {candidate.params:,} weights", "no_benefit")
    bound = ""
    if isinstance(layer, nn.Linear):
        below = candidate.params / (layer.in_features + layer.out_features)
        bound = f"; the layer shrinks only below rank {below:.1f}"
    sizes = f"{option} needs {option.params:,} weights, the dense layer {candidate.params:,}{bound}"
    return Refusal(f"{target} would not make it smaller: {sizes}", "no_benefit")


def _rank_choices(
    module: nn.Module,
    layers: Mapping[str, DenseLayer],
    layer_options: Mapping[str, LayerOptions],
    params: Factorization,
    run: ModuleRun,
    skipped: list[Skip],
) -> dict[str, RankChoice]:
    """Return the layers with a smaller, and where required faster, option."""
    comparable = all(candidate.comparable for candidate in layer_options.values())
    found: dict[str, RankChoice] = {}
    for path, candidate in layer_options.items():
        options = candidate.smaller
        options = options[::-1][:: -(-len(options) // MAX_OPTIONS) or 1][::-1]
        if not options:
            skipped.append(_no_smaller(layers[path], candidate, candidate.options[0], "any rank").skip(path))
            continue
        losses = tuple(option.error if comparable else _share_lost(option, candidate) for option in options)
        found[path] = RankChoice(candidate.params, tuple(options), losses)
    return found if params.per == "bytes" else measure_times(module, found, run, skipped)


def _share_lost(option: RankOption, candidate: LayerOptions) -> float:
    """Return -log of the share of its energy that a layer keeps.

    The sum over layers corresponds to the product of all shares. For layers whose effects on the model are unknown: a
    plain sum of the lost shares would give up whole layers.
    """
    lost = option.error / candidate.energy if candidate.energy > 0 else 0.0
    return -math.log(max(1.0 - lost, MIN_SHARE))


def factorize(module: nn.Module, params: Factorization, run: ModuleRun, samples: int | None) -> Outcome:
    """Replace layers by low-rank products, in place.

    Args:
        module: changed.
        params: goal, targets and form of convolutions.
        run: its statistics are the inputs that count.
        samples: how many of them; None to look at the weights alone.

    Raises:
        TechniqueError: nothing can be factorized, or the target cannot be reached.
    """
    paths, skipped = factorizable(module, params, run)
    found, _ = candidates(module, params)
    layers = {path: found[path] for path in paths}
    influence: dict[str, Tensor] = {}
    if samples is None:
        problems = {path: Problem(weight_of(layer)) for path, layer in layers.items()}
        layer_options = {path: options_of_layer(layers[path], problem, params) for path, problem in problems.items()}
    else:
        layer_options, influence = _options_on_inputs(module, layers, params, run, samples, skipped)
    run.progress("choosing ranks", 0.4)
    chosen = choose_ranks(module, layers, layer_options, params, run, skipped) if layer_options else {}
    if not chosen:
        raise _nothing_to_do(skipped)
    if samples is None:
        errors = {path: _replace_by_weight(module, path, layers[path], option) for path, option in chosen.items()}
    else:
        energies = {path: layer_options[path].plain_energy for path in chosen}
        errors = solve_in_order(module, chosen, influence, energies, run, samples)
    error_of = "weight" if samples is None else "output"
    changed = [_change(path, layers[path], option, errors[path], error_of) for path, option in chosen.items()]
    return Outcome(changed, sorted(skipped, key=lambda skip: skip.path))


def _options_on_inputs(
    module: nn.Module,
    layers: Mapping[str, DenseLayer],
    params: Factorization,
    run: ModuleRun,
    samples: int,
    skipped: list[Skip],
) -> tuple[dict[str, LayerOptions], dict[str, Tensor]]:
    """Return the candidate ranks and the influence of each layer; a layer without usable inputs is skipped."""
    run.progress("measuring how layer outputs affect the model's output", 0.0)
    influence = output_influence(module, layers, run, samples)
    kept = {}
    for path, layer in layers.items():
        if fan_in(layer) > MAX_MOMENT_INPUTS and isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            reason = f"its im2col patches have {fan_in(layer):,} values; second moments allow {MAX_MOMENT_INPUTS:,}"
            skipped.append(Skip(path=path, reason=reason, kind="unsupported"))
        else:
            kept[path] = layer
    layer_options = {}
    for path, moments in input_moments(module, kept, run, samples):
        if refusal := moments_refusal(moments):
            skipped.append(refusal.skip(path))
            continue
        layer_options[path] = options_of_layer(
            layers[path], problem_of(layers[path], moments, influence.get(path)), params
        )
        run.progress("computing second moments of layer inputs", 0.1 + 0.3 * len(layer_options) / len(kept))
    return layer_options, influence


def _replace_by_weight(module: nn.Module, path: str, layer: DenseLayer, option: RankOption) -> float | None:
    """Replace a layer by the block nearest to its weight; return its relative error."""
    weight = weight_of(layer)
    bias = None if layer.bias is None else layer.bias.detach().double()
    block = block_of(layer, option, solve(Problem(weight), option), bias)
    replace_layer(module, path, block)
    size = float(weight.norm())
    return float((weight - product_of(block)).norm()) / size if size > 0 else None


def _change(path: str, layer: DenseLayer, option: RankOption, error: float | None, error_of: str) -> Change:
    before = " x ".join(map(str, layer.weight.shape))
    error_note = "" if error is None else f"; relative error of its {error_of}: {error:.1%}"
    return Change(path=path, what="low rank", before=before, after=f"{option}{error_note}")


def _nothing_to_do(skipped: list[Skip]) -> TechniqueError:
    what = "no layer can be factorized"
    if not skipped:
        return TechniqueError(what, "the model has no Linear layer or Conv2d", "prune or quantize it instead")
    most = Counter(skip.reason for skip in skipped).most_common(3)
    why = "; ".join(f"{count} x {reason}" if count > 1 else reason for reason, count in most)
    return TechniqueError(what, why, "use a smaller rank, energy or rank_ratio, or other targets; or prune or quantize")
