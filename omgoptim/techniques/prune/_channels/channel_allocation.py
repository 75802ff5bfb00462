"""Channel allocation: width of each group by a uniform ratio, a global ranking, or a target of MACs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.macs import count_macs
from omgoptim.requests.prune import Structured
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.prune._channels.groups import Group, Groups, width_of

Widths = dict[str, int]
"""Name of a group to its width."""

MACS_TOLERANCE = 0.02
"""Largest relative distance below the target MACs before rounding is refined. Chosen: exactness against tile sizes."""

FALLBACK_ROUNDINGS = (None, 4, 2, 1)
"""Multiples that widths are rounded to, the default (8) and its halves, tried in this order until the target is met
closely."""


def original_widths(groups: Groups, module: nn.Module, original: nn.Module) -> Widths:
    """Return each group's original width."""
    found = {}
    for group in groups.groups:
        now, then = (width_of(each.get_submodule(group.name), "out") for each in (module, original))
        found[group.name] = group.width * (then or 0) // (now or 1)  # a fused qkv writes three times its group's width
    return found


def target_widths(
    module: nn.Module,
    groups: Groups,
    scores: Mapping[str, Tensor],
    full: Widths,
    params: Structured,
    ratio: float,
) -> dict[str, float]:
    """Return the widths, not rounded, with `ratio` (0..1) of the original channels removed.

    Args:
        module: as it is now.
        groups: of channels that can shrink.
        scores: importance (width,) by group; not looked at when `ranking` is uniform.
        full: the original widths.
        params: with the ranking and the largest ratio of one layer.
        ratio: fraction of the channels to remove.
    """
    if params.ranking == "uniform":
        return {group.name: full[group.name] * (1 - ratio) for group in groups.groups}
    widths: dict[str, float] = {}
    for scope in _scopes(module, groups.groups, params.ranking):
        widths |= _globally_ranked(scope, scores, full, params.max_layer_ratio, ratio)
    return widths


def round_widths(
    groups: Groups, targets: Mapping[str, float], full: Widths, max_layer_ratio: float, round_to: int | None = None
) -> Widths:
    """Round widths to multiples of `round_to`, None for the default of each group; no group grows or vanishes."""
    widths = {}
    for group in groups.groups:
        step = group.step(round_to)
        width = max(math.floor(targets[group.name] / step + 0.5), 1) * step
        widths[group.name] = min(max(width, _min_width(group, full[group.name], max_layer_ratio)), group.width)
    return widths


def most_important(groups: Groups, scores: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the channels to keep of every group that shrinks: its most important units, ascending."""
    keep = {}
    for group in groups.groups:
        if widths.get(group.name, group.width) < group.width:
            units = group.units()
            order = scores[group.name][units[:, 0]].argsort(descending=True, stable=True)
            chosen = units[order[: widths[group.name] // group.unit]]
            keep[group.name] = chosen.flatten().sort().values
    return keep


def _min_width(group: Group, full: int, max_layer_ratio: float) -> int:
    """Return the fewest channels that a group keeps: one unit, and what `max_layer_ratio` leaves."""
    share = math.ceil(full * (1 - max_layer_ratio) / group.unit - 1e-9) * group.unit
    return min(group.width, max(group.unit, share))


def _scopes(module: nn.Module, groups: Sequence[Group], ranking: str) -> list[list[Group]]:
    """Return the groups that are ranked together: all of a kind, or all of one structure (arXiv:2407.04616)."""
    scopes: dict[object, list[Group]] = {}
    for group in groups:
        key: object = group.kind
        if ranking == "isomorphic":
            kinds = [
                (type(module.get_submodule(place.path)).__name__ if place.axis is None else "Parameter", place.side)
                for place in group.places
            ]
            key = (group.kind, *sorted(kinds))
        scopes.setdefault(key, []).append(group)
    return list(scopes.values())


def _globally_ranked(
    scope: Sequence[Group], scores: Mapping[str, Tensor], full: Widths, max_layer_ratio: float, ratio: float
) -> dict[str, float]:
    """Return the widths after removing the least important units over all groups."""
    widths = {group.name: group.width for group in scope}
    min_widths = {group.name: _min_width(group, full[group.name], max_layer_ratio) for group in scope}
    goal = sum(full[group.name] for group in scope) * (1 - ratio)
    total = sum(widths.values())
    units = [
        (float(score), index, group)
        for index, group in enumerate(scope)
        for score in scores[group.name][group.units()[:, 0]]
    ]
    for _, _, group in sorted(units, key=lambda unit: unit[:2]):
        if total <= goal + 1e-9:
            break
        if widths[group.name] - group.unit >= min_widths[group.name]:
            widths[group.name] -= group.unit
            total -= group.unit
    return {name: float(width) for name, width in widths.items()}


def counted_macs(module: nn.Module, probe: Probe) -> tuple[int, Mapping[str, int]]:
    """Return the multiply-accumulates of one sample, in all and by path.

    Raises:
        TechniqueError: they cannot be counted.
    """
    count = count_macs(module, probe.args, probe.kwargs)
    if count.macs is None:
        raise TechniqueError(
            "the model's MACs cannot be counted", "target_macs_ratio needs their count", "use pruning_ratio"
        )
    return count.macs, count.by_path


class MacsPrediction:
    """Multiply-accumulates of a module as a function of its groups' widths, from one count at full width."""

    def __init__(self, module: nn.Module, groups: Groups, probe: Probe) -> None:
        self.current, self._by_path = counted_macs(module, probe)
        self._shares: dict[str, dict[str, list[tuple[Group, float]]]] = {}
        """Path, side, and each group's fraction of that side."""
        for group in groups.groups:
            for place in group.places:
                if place.axis is None and place.path in self._by_path:
                    width = width_of(module.get_submodule(place.path), place.side) or group.width
                    sides = self._shares.setdefault(place.path, {})
                    sides.setdefault(place.side, []).append((group, len(place.positions) / width))
            if group.kind == "heads":  # scores and their product with the values, in the block's own forward
                self._shares.setdefault(group.name.rpartition(".")[0], {})["heads"] = [(group, 1.0)]

    def at(self, widths: Mapping[str, int]) -> float:
        """Return the multiply-accumulates of one sample, predicted from the widths."""
        total = 0.0
        for path, macs in self._by_path.items():
            share = 1.0
            for parts in self._shares.get(path, {}).values():
                share *= 1 - sum(part * (1 - widths[group.name] / group.width) for group, part in parts)
            total += macs * share
        return total


def widths_for_macs(
    groups: Groups,
    scores: Mapping[str, Tensor],
    prediction: MacsPrediction,
    max_macs: float,
    widths_at: Callable[[float, int | None], Widths],
    round_to: int | None,
) -> Widths:
    """Return the largest widths whose multiply-accumulates are at most `max_macs`.

    Args:
        groups: of channels that can shrink.
        scores: importance (width,) by group, by which channels are given back while the target is met.
        prediction: predicts multiply-accumulates from widths.
        max_macs: of one sample.
        widths_at: widths for a ratio and a `round_to`.
        round_to: what widths are multiples of; None to try the default and smaller ones.

    Raises:
        TechniqueError: the narrowest widths still need more.
    """
    found: Widths = {}
    for rounding in FALLBACK_ROUNDINGS if round_to is None else (round_to,):
        low, high = 0.0, 1.0
        if prediction.at(widths_at(high, rounding)) > max_macs:
            continue
        for _ in range(30):
            middle = (low + high) / 2
            if prediction.at(widths_at(middle, rounding)) > max_macs:
                low = middle
            else:
                high = middle
        found = _restored_widths(
            groups, scores, prediction, max_macs, widths_at(high, rounding), widths_at(low, rounding)
        )
        if prediction.at(found) >= max_macs * (1 - MACS_TOLERANCE):
            break
    if not found:
        min_macs = prediction.at(widths_at(1.0, 1 if round_to is None else round_to))
        raise TechniqueError(
            f"the target of {max_macs:,.0f} MACs cannot be reached",
            f"at the limit of max_layer_ratio, the model has {min_macs:,.0f} of its {prediction.current:,} MACs",
            "raise max_layer_ratio, select more layers with targets, or raise target_macs_ratio",
        )
    return found


def _restored_widths(
    groups: Groups,
    scores: Mapping[str, Tensor],
    prediction: MacsPrediction,
    max_macs: float,
    narrow: Widths,
    wide: Widths,
) -> Widths:
    """Return the narrow widths, with the groups of most importance at their wide one as far as `max_macs` allows."""

    def regained(group: Group) -> float:
        ranked = scores[group.name].sort(descending=True).values
        return float(ranked[narrow[group.name] : wide[group.name]].sum())

    widths = dict(narrow)
    for group in sorted(groups.groups, key=regained, reverse=True):
        tried = widths | {group.name: wide[group.name]}
        if prediction.at(tried) <= max_macs:
            widths = tried
    return widths
