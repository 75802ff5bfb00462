"""Sequential factorization: solve layer after layer on the inputs that the compressed layers before it give.

A layer's factors are to reproduce the original layer's output on the original's inputs: first the dense weight M that
does so best on the new inputs (least squares), then the nearest low-rank product on them. So each layer compensates for
the errors of those before it. Layers with the same input are solved together, and neighbours too where there would be
more than `MAX_STAGES` passes: each pass runs the compressed model on the samples, up to the layers in question. The
inputs of the original's layers are cached for as many of them as fit in memory.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.techniques.factorize._low_rank.factor_forms import solve
from omgoptim.techniques.factorize._low_rank.problem import (
    Block,
    Problem,
    RankOption,
    block_of,
    moments_refusal,
    problem_of,
    product_of,
    replace_layer,
    weight_of,
)
from omgoptim.techniques.factorize._low_rank.second_moments import (
    MAX_PASS_BYTES,
    InputMoments,
    add_rows,
    empty_moments,
    fan_in,
    moment_owners,
    moments_bytes,
)
from omgoptim.techniques.probe import LayerCalls, layer_calls
from omgoptim.techniques.reconstruction.inputs import (
    DenseLayer,
    Hook,
    StopForward,
    batches_of,
    call_tensors,
    chunks_by_size,
    forward_hooks,
    input_rows,
    padding_mask,
    rows_of_shape,
    run_until_stopped,
)
from omgoptim.techniques.reconstruction.least_squares import fit_to_inputs
from omgoptim.techniques.registry import ModuleRun

MAX_STAGES = 32
"""Maximum passes over the samples; in a deeper model neighbours share one. Chosen: keeps time linear in depth."""

MAX_CACHED_BYTES = 1_000_000_000
"""Maximum bytes of cached layer inputs of the original, in float32. Chosen by memory: as much as for moments."""

PRIOR_DAMPING = 0.1
"""Damping towards the original weight, as a fraction of an input's mean energy: as measured for channels in
`prune/_reconstruction.py`.
"""

Rows = dict[str, list[Tensor]]
"""Rows of each call of a layer in one batch by path, (groups, rows, in) each."""


@dataclass(slots=True)
class CrossMoments:
    """Cross moments of the inputs x of a layer in the original and z in the compressed model; sums until `finish`."""

    new: InputMoments
    old_mean: Tensor
    """E[x]: (groups, in)."""
    cross: Tensor | None
    """E[x zᵀ]: (groups, in, in); None where a second moment would be too large."""
    paired: bool = True
    """False once the two models gave different numbers of rows: the layer's calls depend on values."""

    @staticmethod
    def empty(layer: DenseLayer) -> CrossMoments:
        new = empty_moments(layer)
        cross = None if new.second is None else torch.zeros_like(new.second)
        return CrossMoments(new, torch.zeros_like(new.mean), cross)

    def add(self, layer: DenseLayer, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Add the rows of one batch, a tensor for each call."""
        for z in new:
            add_rows(self.new, layer, z.double())
        self.paired &= [x.shape for x in old] == [z.shape for z in new]
        if not self.paired:
            return
        for x, z in zip(old, new, strict=True):
            self.old_mean += x.double().sum(1)
            if self.cross is not None:
                self.cross += x.double().mT @ z.double()

    def finish(self) -> None:
        """Turn sums into means."""
        rows = self.new.rows
        self.new.finish()
        if rows:
            self.old_mean /= rows
            if self.cross is not None:
                self.cross /= rows

    def centred_cross(self, centred: bool) -> Tensor | None:
        """Return E[x zᵀ], less the product of the means if `centred`; None if there is none."""
        if self.cross is None or not self.paired:
            return None
        return self.cross - self.old_mean[:, :, None] * self.new.mean[:, None, :] if centred else self.cross


@dataclass(frozen=True, slots=True)
class _RowReader:
    """Reads the inputs of layers on the samples, batch by batch."""

    uses: Mapping[str, LayerCalls]
    run: ModuleRun
    samples: int

    def rows(self, model: nn.Module, layers: Mapping[str, DenseLayer]) -> Iterator[Rows]:
        """Yield the rows of these layers' inputs in a model."""
        for batch in batches_of(self.run.statistics, self.samples):
            yield _inputs(model, layers, self.uses, call_tensors(batch, self.run), self.run)

    def cached(self, model: nn.Module, layers: Mapping[str, DenseLayer]) -> list[Rows] | None:
        """Return the rows of all batches; None where they are too large to keep."""
        needed = sum(_rows_bytes(layer, self.uses[path], self.samples) for path, layer in layers.items())
        return None if needed > MAX_CACHED_BYTES else list(self.rows(model, layers))


def solve_in_order(
    module: nn.Module,
    chosen: Mapping[str, RankOption],
    influence: Mapping[str, Tensor],
    energies: Mapping[str, float],
    run: ModuleRun,
    samples: int,
) -> dict[str, float | None]:
    """Put the blocks of `chosen` into `module`, solved in the order of execution.

    Args:
        module: changed in place.
        chosen: path to ranks.
        influence: path to G of a layer's outputs, where it is known.
        energies: path to E|W x|², without the mean where the layer has a bias.
        run: its statistics are the inputs.
        samples: how many of them to read.

    Returns:
        Path to the relative error of the layer's output, |W x - W' z| / |W x|; None where it is unknown.
    """
    original = copy.deepcopy(module)
    layers: dict[str, DenseLayer] = {path: original.get_submodule(path) for path in chosen}  # type: ignore[misc]
    uses = layer_calls(original, layers, run)
    leaders, reader = moment_owners(layers, uses), _RowReader(uses, run, samples)
    errors: dict[str, float | None] = {}

    def inputs_bytes(stage: list[str]) -> int:
        return sum(_rows_bytes(layers[path], uses[path], samples) for path in {leaders[path] for path in stage})

    for window in chunks_by_size(
        stages(layers, uses), inputs_bytes, MAX_CACHED_BYTES
    ):  # inputs that fit in memory together
        cached = reader.cached(original, {leaders[path]: layers[leaders[path]] for stage in window for path in stage})
        for stage in window:
            leading = {leaders[path]: layers[leaders[path]] for path in stage}
            original_rows = reader.rows(original, leading) if cached is None else cached
            pairs = _cross_moments(leading, original_rows, reader.rows(module, leading))
            for path in stage:
                option, moments = chosen[path], pairs[leaders[path]]
                block, errors[path] = _solve_layer(layers[path], option, moments, influence.get(path), energies[path])
                replace_layer(module, path, block)
            run.progress("fitting the low-rank factors", 0.5 + 0.5 * len(errors) / len(layers))
    return errors


def stages(layers: Mapping[str, DenseLayer], uses: Mapping[str, LayerCalls]) -> list[list[str]]:
    """Return the paths in order of execution in about `MAX_STAGES` lists, those with one input together."""
    by_source: dict[int, list[str]] = {}
    for path in (path for path in uses if path in layers):
        by_source.setdefault(uses[path].sources[0], []).append(path)
    groups = list(by_source.values())
    merge = -(-len(groups) // MAX_STAGES)
    merged = [list(itertools.chain(*groups[i : i + merge])) for i in range(0, len(groups), merge)]
    return [
        part
        for stage in merged
        for part in chunks_by_size(stage, lambda path: 2 * moments_bytes(layers[path]), MAX_PASS_BYTES)
    ]


def _rows_bytes(layer: DenseLayer, use: LayerCalls, samples: int) -> int:
    """Return the bytes of a layer's rows, by the shapes of its calls with a few samples."""
    rows = sum(rows_of_shape(layer, shape) for shape in use.shapes)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return 4 * groups * fan_in(layer) * rows * samples // use.samples


def _cross_moments(
    layers: Mapping[str, DenseLayer], olds: Iterable[Rows], news: Iterable[Rows]
) -> dict[str, CrossMoments]:
    """Return the moments of the layers' inputs in both models."""
    found = {path: CrossMoments.empty(layer) for path, layer in layers.items()}
    for old, new in zip(olds, news, strict=True):
        for path, layer in layers.items():
            found[path].add(layer, old[path], new[path])
    for pairs in found.values():
        pairs.finish()
    return found


def _inputs(
    model: nn.Module,
    layers: Mapping[str, DenseLayer],
    uses: Mapping[str, LayerCalls],
    tensors: dict[str, Tensor],
    run: ModuleRun,
) -> Rows:
    """Return the rows of the layers at these paths in one forward, which ends with the last of their calls."""
    real = padding_mask(tensors)
    rows: Rows = {path: [] for path in layers}
    missing_calls = sum(len(uses[path].shapes) for path in layers)

    def record(path: str) -> Hook:
        def hook(_layer: nn.Module, values: Tensor, _output: Any) -> None:
            nonlocal missing_calls
            rows[path].append(input_rows(layers[path], values, real).float())
            missing_calls -= 1
            if not missing_calls:
                raise StopForward

        return hook

    args, kwargs = run.signature.to_call(tensors)
    with forward_hooks(model, {path: record(path) for path in layers}, before=True):
        run_until_stopped(model, args, kwargs)
    return rows


def _solve_layer(
    layer: DenseLayer, option: RankOption, pairs: CrossMoments, influence: Tensor | None, energy: float
) -> tuple[Block, float | None]:
    """Return the block for a layer, and its relative error; None where that is unknown."""
    new, weight = pairs.new, weight_of(layer)
    bias = None if layer.bias is None else layer.bias.detach().double()
    if moments_refusal(new):  # the compressed model gives it nothing to go by: its own weight is what is left
        return block_of(layer, option, solve(Problem(weight, influence=influence), option), bias), None
    problem = problem_of(layer, new, influence)
    cross, moment, old_mean = pairs.centred_cross(bias is not None), problem.moment, new.mean
    if cross is not None and moment is not None:
        old_mean = pairs.old_mean
        fitted = [
            fit_to_inputs(w, c, m, PRIOR_DAMPING) for w, c, m in zip(weight.flatten(2), cross, moment, strict=True)
        ]
        problem = replace(problem, weight=torch.stack(fitted).reshape(weight.shape))
    block = block_of(layer, option, solve(problem, option), None)
    w, p = weight.flatten(2), product_of(block).flatten(2)
    if bias is not None and block.b.bias is not None:
        shift = torch.einsum("gon,gn->go", w, old_mean) - torch.einsum("gon,gn->go", p, new.mean)
        block.b.bias.data.copy_(bias + shift.flatten())
    if cross is None or moment is None or not energy > 0:
        return block, None
    lost = energy - 2 * float(((w @ cross) * p).sum()) + float(((p @ moment) * p).sum())
    return block, math.sqrt(max(lost, 0.0) / energy)
