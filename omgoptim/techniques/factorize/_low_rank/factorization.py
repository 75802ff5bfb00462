"""Factorization of a module: select layers, choose ranks, replace layers by blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.reports import Change, Skip
from omgoptim.requests.factorize import Factorization
from omgoptim.techniques.factorize._low_rank.factor_forms import solve
from omgoptim.techniques.factorize._low_rank.layer_selection import candidates, factorizable
from omgoptim.techniques.factorize._low_rank.problem import Option, Problem
from omgoptim.techniques.factorize._low_rank.rank_selection import Ladder, choose, ladder_of_layer
from omgoptim.techniques.factorize._low_rank.replacement import (
    block_of,
    problem_of,
    product_of,
    put,
    unusable,
    weight_of,
)
from omgoptim.techniques.factorize._low_rank.second_moments import WIDEST, in_of, input_moments, output_influence
from omgoptim.techniques.factorize._low_rank.sequential_solve import solve_in_order
from omgoptim.techniques.reconstruction.rows import DenseLayer
from omgoptim.techniques.registry import ModuleRun, Outcome


def factorize(module: nn.Module, params: Factorization, run: ModuleRun, samples: int | None) -> Outcome:
    """Replace layers by low-rank products, in place.

    Args:
        module: changed.
        params: goal, targets and form of convolutions.
        run: its statistics are the inputs that count.
        samples: how many of them; None to look at the weights alone.

    Raises:
        TechniqueError: nothing can be factorized, or the goal is out of reach.
    """
    paths, skipped = factorizable(module, params, run)
    found, _ = candidates(module, params)
    layers = {path: found[path] for path in paths}
    ladders = _of_weights(layers, params) if samples is None else {}
    influence: dict[str, Tensor] = {}
    if samples is not None:
        ladders, influence = _on_inputs(module, layers, params, run, samples, skipped)
    run.progress("choosing ranks", 0.4)
    chosen = choose(module, layers, ladders, params, run, skipped) if ladders else {}
    if not chosen:
        raise _nothing_to_do(skipped)
    if samples is None:
        errors = {path: _by_weight(module, path, layers[path], option) for path, option in chosen.items()}
    else:
        energies = {path: ladders[path].plain_energy for path in chosen}
        errors = solve_in_order(module, chosen, influence, energies, run, samples)
    of = "weight" if samples is None else "output"
    changed = [_change(path, layers[path], option, errors[path], of) for path, option in chosen.items()]
    return Outcome(changed, sorted(skipped, key=lambda skip: skip.path))


def _of_weights(layers: Mapping[str, DenseLayer], params: Factorization) -> dict[str, Ladder]:
    return {path: ladder_of_layer(layer, Problem(weight_of(layer)), params) for path, layer in layers.items()}


def _on_inputs(
    module: nn.Module,
    layers: Mapping[str, DenseLayer],
    params: Factorization,
    run: ModuleRun,
    samples: int,
    skipped: list[Skip],
) -> tuple[dict[str, Ladder], dict[str, Tensor]]:
    """Return the candidate ranks and the influence of each layer; a layer without usable inputs is skipped."""
    run.progress("measuring the influence of layer outputs", 0.0)
    influence = output_influence(module, layers, run, samples)
    kept = {}
    for path, layer in layers.items():
        if in_of(layer) > WIDEST and isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            reason = f"its patches have {in_of(layer):,} values, and moments are kept of {WIDEST:,} at most"
            skipped.append(Skip(path=path, reason=reason))
        else:
            kept[path] = layer
    ladders = {}
    for path, moments in input_moments(module, kept, run, samples):
        nothing = unusable(moments)
        if nothing:
            skipped.append(Skip(path=path, reason=nothing))
            continue
        ladders[path] = ladder_of_layer(layers[path], problem_of(layers[path], moments, influence.get(path)), params)
        run.progress("measuring the moments of layer inputs", 0.1 + 0.3 * len(ladders) / len(kept))
    return ladders, influence


def _by_weight(module: nn.Module, path: str, layer: DenseLayer, option: Option) -> float | None:
    """Replace a layer by the block nearest to its weight; return its relative error."""
    weight = weight_of(layer)
    bias = None if layer.bias is None else layer.bias.detach().double()
    block = block_of(layer, option, solve(Problem(weight), option), bias)
    put(module, path, block)
    size = float(weight.norm())
    return float((weight - product_of(block)).norm()) / size if size > 0 else None


def _change(path: str, layer: DenseLayer, option: Option, error: float | None, of: str) -> Change:
    before = " x ".join(map(str, layer.weight.shape))
    error_note = "" if error is None else f"; its {of} changes by {error:.1%}"
    return Change(path=path, what="low rank", before=before, after=f"{option}{error_note}")


def _nothing_to_do(skipped: list[Skip]) -> TechniqueError:
    what = "no layer can be factorized"
    if not skipped:
        return TechniqueError(what, "the model has no Linear layer and no Conv2d", "prune or quantize it instead")
    most = Counter(skip.reason for skip in skipped).most_common(3)
    why = "; ".join(f"{count} x {reason}" if count > 1 else reason for reason, count in most)
    return TechniqueError(what, why, "a smaller rank, energy or rank_ratio, or other targets; else prune or quantize")
