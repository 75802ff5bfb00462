"""Width reduction: keep a fraction of the channels, heads and hidden units of a module.

What can shrink is found and verified once; then copies of the module are cut to any number of widths, and the layers
that lost inputs are fitted where there is data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.reports import Change, Skip
from omgoptim.requests.prune import Structured
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.distill._student.recurrent import Recurrent, find_recurrent, narrow_units
from omgoptim.techniques.prune._channels.channel_allocation import most_important, round_widths, target_widths
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.groups import Groups
from omgoptim.techniques.prune._channels.importance import importance_of
from omgoptim.techniques.prune._channels.removal import remove_with_positions
from omgoptim.techniques.prune._reconstruction import reconstruct_channels
from omgoptim.techniques.registry import ModuleRun, Outcome

ROUND_TO, ROUND_FROM = 8, 64
"""Widths of at least the second are multiples of the first, the float32 numbers of an AVX2 register: there rounding
moves a width by a sixteenth at most; smaller ones are any number."""

MIN_FRACTION = 1e-9
"""Minimum fraction of a group that is kept. Chosen near 0: one unit stays, whatever the width."""


@dataclass(frozen=True, slots=True)
class Narrowing:
    """Narrowable groups of one module, with the importance of each channel."""

    groups: Groups
    scores: Mapping[str, Tensor]
    recurrent: list[Recurrent]
    skipped: list[Skip]

    @property
    def is_possible(self) -> bool:
        return bool(self.groups.groups or self.recurrent)


def find_narrowing(module: nn.Module, selection: LayerSelection, run: ModuleRun) -> Narrowing:
    """Find the narrowable groups of a module, which is not changed.

    Raises:
        SetupError: torch-pruning is not installed.
        TechniqueError: the model cannot be traced, and has no recurrent layer that could shrink.
    """
    if selection.nothing:
        return Narrowing(Groups([]), {}, [], [])
    recurrent, skipped = find_recurrent(module, selection, run)
    params = Structured(targets=selection.targets, ignore=selection.ignore)
    try:
        groups = find_groups(module, params, run)
    except TechniqueError as error:
        if not recurrent:
            raise
        groups = Groups([], [Skip(path="(model)", reason=error.reason, kind="unsupported")])
    shrinking = {each.path for each in recurrent}
    skipped += [skip for skip in groups.skipped if skip.path not in shrinking]
    return Narrowing(groups, importance_of(module, groups, params, run), recurrent, skipped)


def narrow_to(
    module: nn.Module,
    narrowing: Narrowing,
    width: float,
    run: ModuleRun,
    *,
    fit: bool,
    round_to: int | None = None,
) -> Outcome:
    """Keep the most important fraction `width` of every group's channels and units, at least one; in place.

    Args:
        module: the one in which `narrowing` was found, or a copy of it.
        narrowing: groups of channels and units that can shrink.
        width: fraction of each group that stays, 0..1.
        run: how the module is called, and its batches.
        fit: whether layers that lost inputs are fitted to what they gave, where the run has real data.
        round_to: what widths are multiples of; None for 8 from 64 channels on.
    """
    before = copy.deepcopy(module) if fit and run.real else None
    counts = [(each, _units(each.width, width, round_to)) for each in narrowing.recurrent]
    changed, remaining = narrow_units(module, [(each, count) for each, count in counts if count < each.width])
    kept_columns = {(path, "in"): columns for path, columns in remaining.items()}
    skipped = list(narrowing.skipped)
    keep = most_important(narrowing.groups, narrowing.scores, _widths(module, narrowing, width, round_to))
    if keep:
        outcome, sides = remove_with_positions(module, narrowing.groups, keep, run)
        changed += outcome.changed
        skipped += [skip for skip in outcome.skipped if skip not in narrowing.groups.skipped]  # those are in it
        kept_columns |= sides
    if before is not None and kept_columns:
        reconstruct_channels(module, before, kept_columns, run)
    return Outcome(_in_order(module, changed), skipped)


def _units(full: int, width: float, round_to: int | None) -> int:
    exact = full * width
    step = round_to or (ROUND_TO if exact >= ROUND_FROM else 1)
    return min(full, max(math.floor(exact / step + 0.5), 1) * step)


def _widths(module: nn.Module, narrowing: Narrowing, width: float, round_to: int | None) -> dict[str, int]:
    full = {group.name: group.width for group in narrowing.groups.groups}
    params = Structured(max_layer_ratio=1 - MIN_FRACTION)
    targets = target_widths(module, narrowing.groups, narrowing.scores, full, params, 1 - width)

    def rounded(step: int) -> dict[str, int]:
        return round_widths(narrowing.groups, targets, full, params.max_layer_ratio, step)

    if round_to is not None:
        return rounded(round_to)
    fine, coarse = rounded(1), rounded(ROUND_TO)
    return {name: coarse[name] if fine[name] >= ROUND_FROM else fine[name] for name in fine}


def _in_order(module: nn.Module, changes: list[Change]) -> list[Change]:
    order = {path: index for index, (path, _) in enumerate(module.named_modules(remove_duplicate=False))}
    return sorted(changes, key=lambda change: order.get(change.path, -1))
