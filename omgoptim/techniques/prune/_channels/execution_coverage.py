"""Execution coverage: the layers that run for each sample, beyond those in a trace of one batch.

A forward that branches on values (`if x.mean() > 0`, early exits, mixtures of experts) can run other layers for other
inputs. A dependency graph knows nothing of the layers that the traced batch did not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.samples import batch_length, forward_args
from omgoptim.techniques.probe import Probe, quiet
from omgoptim.techniques.prune._channels.groups import Group
from omgoptim.techniques.prune._channels.layer_widths import width_of
from omgoptim.techniques.registry import ModuleRun

MOST_SAMPLES = 64
"""Samples that are run one by one."""
MOST_WAYS = 8
"""Maximum number of execution paths of which a sample is kept for verification."""

Call = tuple[tuple[Tensor, ...], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Coverage:
    """Number of samples for which each layer with weights ran."""

    samples: int
    """Number of samples that ran."""
    runs: dict[str, int] = field(default_factory=dict)
    """Number of samples by path of a layer with parameters of its own."""
    ways: list[Call] = field(default_factory=list)
    """One sample for each execution path, where there are several; else empty."""

    def partial(self) -> dict[str, str]:
        """Reason for keeping each layer that does not always run, by path."""
        return {path: self._reason(count) for path, count in self.runs.items() if count < self.samples}

    def _reason(self, count: int) -> str:
        if count == 0:
            return f"it ran for none of {self.samples} samples: what hangs together with it is unknown"
        return f"it runs only for some inputs ({count} of {self.samples} samples)"

    def why_not(self, module: nn.Module, group: Group) -> str:
        """Return why layers that do not always run forbid removing channels; empty where they do not.

        A layer that never ran may read or write the channels of any group of its own width.
        """
        partial = self.partial()
        if group.name in partial:
            return partial[group.name]
        for place in group.places:
            if place.axis is None and place.path in partial:
                return f"{place.path} holds its channels, and {partial[place.path]}"
        for path in partial:
            layer = module.get_submodule(path)
            if self.runs[path] == 0 and group.width in (width_of(layer, "in"), width_of(layer, "out")):
                return f"{path} may read or write its channels, and {partial[path]}"
        return ""


def coverage(module: nn.Module, run: ModuleRun) -> Coverage:
    """Run the module on the first samples of the statistics, one by one; samples on which it fails are left out."""
    layers = {path: layer for path, layer in module.named_modules() if path and layer._parameters}
    runs = dict.fromkeys(layers, 0)
    ways: dict[frozenset[str], Call] = {}
    ran: set[str] = set()

    def note(path: str) -> Any:
        return lambda _layer, _args: ran.add(path)

    hooks = [layer.register_forward_pre_hook(note(path)) for path, layer in layers.items()]
    count = 0
    try:
        with evaluation_mode(module), quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for args, kwargs in _one_by_one(run):
                ran.clear()
                try:
                    module(*args, **kwargs)
                except Exception:  # noqa: BLE001 - a forward that does not take this sample alone says nothing here
                    continue
                count += 1
                for path in ran:
                    runs[path] += 1
                ways.setdefault(frozenset(ran), (args, kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    return Coverage(count, runs, list(ways.values())[:MOST_WAYS] if len(ways) > 1 else [])


def covering(module: nn.Module, run: ModuleRun) -> tuple[Probe, Coverage]:
    """Return a probe on two samples and one per execution path, and the coverage."""
    known = coverage(module, run)
    return replace(Probe.of(run), others=tuple(known.ways)), known


def _one_by_one(run: ModuleRun) -> Iterator[Call]:
    taken = 0
    for batch in run.statistics.batches:
        for row in range(min(batch_length(batch), MOST_SAMPLES - taken)):
            taken += 1
            yield forward_args(run.signature, {name: array[row : row + 1] for name, array in batch.items()}, run.device)
