"""Channel groups from torch-pruning's dependency graph, each verified by running the module.

torch-pruning traces a forward pass and infers which channels belong together. Its inference is heuristic, so every
group is tried once: one unit is removed, and the outputs are compared with those of the module that ignores the unit,
on two samples and on one for each execution path that samples take. Groups that fail are skipped with the reason.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from omgoptim.errors import SetupError, TechniqueError
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import attached
from omgoptim.models.globs import refuse_unknown
from omgoptim.models.samples import batch_length, forward_args
from omgoptim.reports import Skip
from omgoptim.requests.prune import Structured
from omgoptim.runtimes.signature import flatten
from omgoptim.techniques.probe import (
    DoesNotRun,
    Probe,
    WalkLimit,
    call_torch_pruning,
    error_location,
    parameter_owners,
    quiet_output,
    torch_pruning_context,
)
from omgoptim.techniques.prune._channels.attention_heads import find_heads
from omgoptim.techniques.prune._channels.groups import (
    Group,
    Groups,
    Place,
    Side,
    channel_groups,
    exclusion,
    is_depthwise,
    skips_of_kept,
    why_kept,
    width_of,
)
from omgoptim.techniques.prune._channels.removal import MODEL_OUTPUTS, Removal
from omgoptim.techniques.registry import ModuleRun, Refusal

_OTHER_KIND = Refusal("only Linear layers and convolutions are narrowed, with what depends on them", "unsupported")

MAX_SAMPLES = 64
"""Samples that are run one by one: a path that 5 % of the inputs take is met with a probability of 96 %."""
MAX_EXECUTION_PATHS = 8
"""Maximum execution paths of which a sample is kept. Chosen: each adds a forward to every verification."""

Call = tuple[tuple[Tensor, ...], dict[str, Tensor]]

MIN_BLOCKS = 4
"""Minimum number of norm groups for which whole groups are removed; with fewer, the same channels of each are removed,
which moves its mean.
"""


@dataclass(frozen=True, slots=True)
class LayerRuns:
    """Number of samples for which each layer with weights ran."""

    samples: int
    """Number of samples that ran."""
    runs: dict[str, int] = field(default_factory=dict)
    """Number of samples by path of a layer with parameters of its own."""
    execution_paths: list[Call] = field(default_factory=list)
    """One sample for each execution path, where there are several; else empty."""

    def partial(self) -> dict[str, str]:
        """Reason for keeping each layer that does not always run, by path."""
        return {path: self._reason(count) for path, count in self.runs.items() if count < self.samples}

    def _reason(self, count: int) -> str:
        if count == 0:
            return f"it ran for none of {self.samples} samples: the layers that depend on it are unknown"
        return f"it runs only for some inputs ({count} of {self.samples} samples)"

    def why_kept(self, module: nn.Module, group: Group) -> Refusal | None:
        """Return why layers that do not always run forbid removing channels; None where they do not.

        A layer that never ran may read or write the channels of any group of its own width.
        """
        partial = self.partial()
        if group.name in partial:
            return Refusal(partial[group.name], "not_run")
        for place in group.places:
            if place.axis is None and place.path in partial:
                return Refusal(f"its channels are also those of {place.path}: {partial[place.path]}", "not_run")
        for path in partial:
            layer = module.get_submodule(path)
            if self.runs[path] == 0 and group.width in (width_of(layer, "in"), width_of(layer, "out")):
                return Refusal(f"{path} may read or write its channels: {partial[path]}", "not_run")
        return None


def coverage(module: nn.Module, run: ModuleRun) -> LayerRuns:
    """Run the module on the first samples of the statistics, one by one; samples on which it fails are left out."""
    layers = {path: layer for path, layer in module.named_modules() if path and layer._parameters}
    runs = dict.fromkeys(layers, 0)
    execution_paths: dict[frozenset[str], Call] = {}
    ran: set[str] = set()

    def record(path: str) -> Any:
        def hook(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not _is_empty((args, kwargs)):
                ran.add(path)

        return hook

    hooks = [layer.register_forward_pre_hook(record(path), with_kwargs=True) for path, layer in layers.items()]
    count = 0
    with attached(hooks), evaluation_mode(module), quiet_output(), torch.random.fork_rng(devices=[]), torch.no_grad():
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
            execution_paths.setdefault(frozenset(ran), (args, kwargs))
    return LayerRuns(
        count, runs, list(execution_paths.values())[:MAX_EXECUTION_PATHS] if len(execution_paths) > 1 else []
    )


def _is_empty(inputs: Any) -> bool:
    """Return whether a layer is called with no rows, such as an expert that no sample was sent to."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return bool(tensors) and not any(tensor.numel() for tensor in tensors)


def covering(module: nn.Module, run: ModuleRun) -> tuple[Probe, LayerRuns]:
    """Return a probe on two samples and one per execution path, and the coverage."""
    layer_coverage = coverage(module, run)
    return replace(Probe.of(run), further_calls=tuple(layer_coverage.execution_paths)), layer_coverage


def _one_by_one(run: ModuleRun) -> Iterator[Call]:
    taken = 0
    for batch in run.statistics.batches:
        for row in range(min(batch_length(batch), MAX_SAMPLES - taken)):
            taken += 1
            yield forward_args(run.signature, {name: array[row : row + 1] for name, array in batch.items()}, run.device)


@dataclass(frozen=True, slots=True)
class _Skipped:
    """A layer whose channels form no group, with the reason."""

    path: str
    refusal: Refusal


def _unsupported(path: str, reason: str) -> _Skipped:
    return _Skipped(path, Refusal(reason, "unsupported"))


def find_groups(module: nn.Module, params: Structured, run: ModuleRun) -> Groups:
    """Find every group of channels and heads that can shrink, each tried once; the module is not changed.

    Raises:
        SetupError: torch-pruning is not installed.
        TechniqueError: a glob names no layer, or the model cannot be traced.
    """
    refuse_unknown((*params.targets, *params.ignore), [path for path, _ in module.named_modules() if path])
    probe, layer_coverage = covering(module, run)
    try:
        probe.outputs(module)
    except DoesNotRun as error:
        raise TechniqueError("the model does not run with a batch of 2", str(error)) from error
    attentions, skipped = find_heads(module, probe)
    claimed = frozenset().union(*(attention.claimed for attention in attentions))
    candidates: list[Group | _Skipped] = [attention.group for attention in attentions]
    candidates += _channel_groups(module, probe, claimed)
    skipped += _untraced(module, candidates, layer_coverage)
    owners, removal = parameter_owners(module), Removal(module, run, probe)
    groups: list[Group] = []
    for index, found in enumerate(candidates):
        run.progress("finding removable channels", index / len(candidates))
        if isinstance(found, _Skipped):
            skipped.append(found.refusal.skip(found.path))
            continue
        refusal = (
            exclusion(found, params)
            or why_kept(module, found.places, owners)
            or layer_coverage.why_kept(module, found)
            or removal.check(found)
        )
        if refusal:
            skipped += skips_of_kept(module, found.name, found.writers, refusal)
        else:
            groups.append(found)
    skipped += _remaining_layers(module, {place.path for group in groups for place in group.places}, skipped)
    order = {path: index for index, (path, _) in enumerate(module.named_modules())}
    groups.sort(key=lambda group: order[group.name])
    skipped.sort(key=lambda skip: order.get(skip.path, -1))
    return Groups(groups, skipped, probe.further_calls)


def _untraced(module: nn.Module, candidates: Sequence[Group | _Skipped], layer_coverage: LayerRuns) -> Iterator[Skip]:
    """Yield the layers that run only for some samples and that the trace of one batch missed."""
    traced_paths = {place.path for each in candidates if isinstance(each, Group) for place in each.places}
    traced_paths |= {each.path for each in candidates if isinstance(each, _Skipped)}
    for path, reason in layer_coverage.partial().items():
        if path not in traced_paths and isinstance(module.get_submodule(path), (_ConvNd, nn.Linear)):
            yield Skip(path=path, reason=reason, kind="not_run")


def _remaining_layers(module: nn.Module, shrinking: set[str], skipped: Sequence[Skip]) -> Iterator[Skip]:
    """Yield the layers with weight matrices that are in no group and have no reason yet, such as embeddings."""
    named = shrinking | {skip.path for skip in skipped}
    for path, layer in module.named_modules():
        matrix = any(weight is not None and weight.ndim > 1 for weight in layer._parameters.values())
        if path and matrix and not any(path == name or path.startswith(f"{name}.") for name in named):
            yield _OTHER_KIND.skip(path)


def _channel_groups(module: nn.Module, probe: Probe, claimed: frozenset[str]) -> Iterator[Group | _Skipped]:
    """Yield torch-pruning's groups of channels, without those of attention layers."""
    copied = copy.deepcopy(module)
    for tensor in copied.parameters():
        tensor.requires_grad_(tensor.is_floating_point())  # the graph is read from gradients; frozen ones have none
    recurrent = [layer for layer in copied.modules() if isinstance(layer, nn.RNNBase)]
    for path, layer in module.named_modules():
        if isinstance(layer, nn.RNNBase):
            yield _unsupported(path, f"the hidden size of a recurrent layer ({type(layer).__name__}) is not pruned")
    graph = call_torch_pruning(
        "tracing channel dependencies with torch-pruning", lambda: _graph(copied, probe, recurrent)
    )
    limit = WalkLimit(graph, copied, probe)
    paths = {layer: path for path, layer in copied.named_modules()}
    written: set[str] = set()
    for path, layer in copied.named_modules():
        root = isinstance(layer, (_ConvNd, nn.Linear)) and not is_depthwise(layer)
        if not root or path in written or path in claimed or layer not in graph.module2node:
            continue
        try:
            with torch_pruning_context():
                limit.steps = 0
                pruner = graph.get_pruner_of_module(layer)
                width = pruner.get_out_channels(layer)
                pruning_group = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(width)))
        except Exception as error:  # noqa: BLE001 - whatever torch-pruning's rules run into: one group less
            yield _unsupported(path, f"torch-pruning cannot trace its channels: {error_location(error)}")
            continue
        places, reaches_output = _places(graph, pruning_group, paths)
        written |= {place.path for place in places if place.side == "out"}
        if claimed & {place.path for place in places if place.side == "out"}:
            continue  # its heads are a group already
        if not places:
            yield _unsupported(path, "torch-pruning cannot map its channels to those of the next layers")
        elif reaches_output or not any(place.side == "in" for place in places):
            writers = [place.path for place in places if place.side == "out"]
            yield from (
                _Skipped(skip.path, MODEL_OUTPUTS) for skip in skips_of_kept(copied, path, writers, MODEL_OUTPUTS)
            )
        else:
            yield _group(copied, path, width, places)


def _graph(module: nn.Module, probe: Probe, recurrent: Sequence[nn.Module]) -> Any:
    """Build the dependency graph of a module, which is put in eval mode."""
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise SetupError(
            "structured pruning needs torch-pruning",
            f"{error.name} is not installed in {sys.executable}",
            f"{sys.executable} -m pip install torch-pruning",
        ) from error

    def forward(model: nn.Module, _inputs: object) -> list[Tensor]:
        results = flatten(model(*probe.args, **probe.kwargs))
        return [leaf for leaf in results if isinstance(leaf, Tensor) and leaf.grad_fn is not None]

    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(
            module,
            example_inputs=(),
            forward_fn=forward,
            ignored_layers=list(recurrent),
            ignored_params=[tensor for layer in recurrent for tensor in layer.parameters()],
            verbose=False,
        )


def _places(graph: Any, pruning_group: Any, paths: dict[nn.Module, str]) -> tuple[list[Place], bool]:
    """Return the places of one of torch-pruning's groups, and whether they are outputs of the model."""
    from torch_pruning.ops import OPTYPE

    places, reaches_output = [], False
    for item in pruning_group:
        node, handler = item.dep.target, item.dep.handler
        if node.type == OPTYPE.OUTPUT:
            reaches_output = True
            continue
        is_parameter = node.type == OPTYPE.PARAMETER
        one_weight = isinstance(node.module, nn.PReLU) and node.module.num_parameters == 1
        if not is_parameter and (node.module not in paths or one_weight):
            continue  # an operation without weights, or with one for all channels
        pairs = sorted(zip(item.idxs, item.root_idxs, strict=True), key=lambda pair: pair[0])
        if any(root is None for _, root in pairs):
            return [], reaches_output
        positions, roots = (torch.tensor([pair[end] for pair in pairs], dtype=torch.long) for end in (0, 1))
        if is_parameter:
            axis = int(node.pruning_dim) % node.module.ndim
            places.append(Place(graph._param_to_name[node.module], "out", positions, roots, axis))
        else:
            side: Side = "out" if graph.is_out_channel_pruning_fn(handler) else "in"
            places.append(Place(paths[node.module], side, positions, roots))
    return places, reaches_output


def _group(module: nn.Module, root: str, width: int, places: Sequence[Place]) -> Group | _Skipped:
    """Return a group in units as its grouped convolutions and normalizations require."""
    convs: set[int] = set()
    norms: set[int] = set()
    for place in places:
        layer = module.get_submodule(place.path) if place.axis is None else None
        if layer is None or (channel_groups(layer) == 1 and not isinstance(layer, nn.GroupNorm)):
            continue
        if width_of(layer, place.side) != width:
            return _unsupported(root, f"{place.path} splits its and other layers' channels into equal groups")
        (norms if isinstance(layer, nn.GroupNorm) else convs).add(channel_groups(layer))
    conv_unit = math.lcm(*convs)
    block = math.lcm(*(width // norm for norm in norms)) if norms else 1
    if norms and conv_unit == 1 and width % block == 0 and width // block >= MIN_BLOCKS:
        return Group(root, width, block, "channels", tuple(places))
    unit = math.lcm(conv_unit, *norms)
    if width % unit or width // unit < 2:
        return _unsupported(root, f"its {width} channels can only be removed in steps of {unit}")
    blocked = unit == 1 and not norms
    return Group(root, width, unit, "channels", tuple(places), blocked=blocked, exact=not norms)
