"""Hidden units of LSTM, GRU and RNN layers: which weights hold a unit, and their removal.

A layer's parameters have gates * units rows, one block of units for each gate; `weight_hh` reads the layer's own units,
`weight_ih` of the layers above the lowest those of the layer below, both directions side by side.

The columns that read a unit are found by running the model with a distinct number in place of the unit's outputs: a
column that reads that number under several assignments reads that unit. Every removal is verified as for channels: the
model without some units must give the outputs of the model that ignores them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from omgoptim.models.forward import attached
from omgoptim.reports import Change, Skip
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.probe import (
    EXCLUDED,
    DoesNotRun,
    Probe,
    frozen_or_shared,
    is_shared,
    parameter_owners,
    relative_difference,
    tolerance_of,
)
from omgoptim.techniques.prune._channels.groups import narrowed
from omgoptim.techniques.reconstruction.inputs import Hook, forward_hooks
from omgoptim.techniques.registry import ModuleRun, Refusal

WIDTHS = (
    *("hidden_size", "hidden_dim", "hidden", "hidden_units", "hidden_features", "n_hidden", "num_hidden", "nhid"),
    *("rnn_size", "lstm_size", "gru_size", "units", "d_hidden", "rnn_units"),
)
"""Attribute names for the width of recurrent layers."""

INTEGER_TOLERANCE = 1e-2
"""Tolerance of a float32 mean of equal integers. Chosen: far above rounding, far below 1."""


@dataclass(frozen=True, slots=True)
class HiddenReader:
    """A layer that reads hidden units in some columns of its weight."""

    path: str
    columns: Tensor
    """Columns (n,) of its inputs."""
    units: Tensor
    """(n,) the unit that each of them reads, counted over all layers and directions."""


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A recurrent layer whose units can be removed."""

    path: str
    importance: Tensor
    """Importance of every unit, (layers * directions, hidden units)."""
    readers: tuple[HiddenReader, ...]
    numbers: tuple[tuple[str, str], ...] = ()
    """Path and name of attributes that hold the number of units."""

    @property
    def width(self) -> int:
        return self.importance.shape[1]

    def best(self, keep: int) -> Tensor:
        """Return the most important units, ascending, (layers * directions, keep)."""
        return self.importance.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values


def narrow_units(module: nn.Module, keep: Sequence[tuple[Recurrent, int]]) -> tuple[list[Change], dict[str, Tensor]]:
    """Leave only the most important units of recurrent layers, in place.

    Args:
        module: changed in place.
        keep: each layer, found in this module, and how many units stay in each of its layers and directions.

    Returns:
        What changed, and path of each layer that reads them to the columns that are left, as counted before.
    """
    changes = []
    kept_columns: dict[str, Tensor] = {}
    for recurrent, count in keep:
        layer: Any = module.get_submodule(recurrent.path)
        before, kept = layer.hidden_size, recurrent.best(count)
        _remove_units(layer, kept)
        for path, name in recurrent.numbers:
            setattr(module.get_submodule(path), name, count)
        changes.append(Change(path=recurrent.path, what="hidden units", before=str(before), after=str(count)))
        for reader in recurrent.readers:
            columns = torch.ones(inputs_of(module.get_submodule(reader.path)), dtype=torch.bool)
            rows = torch.arange(len(kept)).unsqueeze(1) * before
            columns[reader.columns] = torch.isin(reader.units, (rows + kept).flatten())
            kept_columns[reader.path] = kept_columns.get(reader.path, True) & columns
    left = {path: columns.nonzero().flatten() for path, columns in kept_columns.items()}
    changes += [_narrow_reader(module.get_submodule(path), path, columns) for path, columns in left.items()]
    return changes, left


def inputs_of(layer: Any) -> int:
    return int(layer.input_size if isinstance(layer, nn.RNNBase) else layer.in_features)


def _suffixes(layer: Any) -> Iterator[tuple[int, int, str]]:
    """Yield row index, layer index and the suffix of the parameters' names, for each layer and direction."""
    directions = ["", "_reverse"] if layer.bidirectional else [""]
    for index in range(layer.num_layers):
        for direction_index, direction in enumerate(directions):
            yield index * len(directions) + direction_index, index, f"_l{index}{direction}"


def _importance_of_units(module: nn.Module, layer: Any, rows: int, readers: list[HiddenReader]) -> Tensor:
    """Return the sum of squares of the weights that write a unit and of those that read it."""
    width = layer.hidden_size
    total = torch.zeros(rows, width, dtype=torch.float64)
    directions = 2 if layer.bidirectional else 1
    for row, index, suffix in _suffixes(layer):
        inputs, hidden = (getattr(layer, f"weight_{kind}{suffix}").detach().double().cpu() for kind in ("ih", "hh"))
        total[row] += inputs.square().sum(1).view(-1, width).sum(0) + hidden.square().sum(1).view(-1, width).sum(0)
        total[row] += hidden.square().sum(0)
        if index:  # what the layer below wrote
            below = inputs.square().sum(0).view(directions, width)
            total[(index - 1) * directions : index * directions] += below
    flat = total.view(-1)
    for reader in readers:
        part: Any = module.get_submodule(reader.path)
        for weight in _reading_weights(part):
            flat.index_add_(0, reader.units, weight.detach().double().cpu().square().sum(0)[reader.columns])
    return total


def _reading_weights(layer: Any) -> list[Tensor]:
    if isinstance(layer, nn.RNNBase):
        return [getattr(layer, f"weight_ih{suffix}") for _, index, suffix in _suffixes(layer) if index == 0]
    return [layer.weight]


def _remove_units(layer: Any, kept: Tensor) -> None:
    """Remove units from a recurrent layer. kept: (layers * directions, units that stay)."""
    width, directions = layer.hidden_size, 2 if layer.bidirectional else 1
    offsets = torch.arange(directions).unsqueeze(1) * width
    for row, index, suffix in _suffixes(layer):
        gates = getattr(layer, f"weight_hh{suffix}").shape[0] // width
        written = (torch.arange(gates).unsqueeze(1) * width + kept[row]).flatten()
        below = (offsets + kept[(index - 1) * directions : index * directions]).flatten() if index else None
        for name in (f"{kind}{suffix}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
            tensor = layer._parameters.get(name)
            if tensor is None:
                continue
            new = narrowed(tensor, 0, written)
            if name.startswith("weight_hh"):
                new = narrowed(new, 1, kept[row])
            elif name.startswith("weight_ih") and below is not None:
                new = narrowed(new, 1, below)
            setattr(layer, name, new)
    layer.hidden_size = kept.shape[1]


def _narrow_reader(layer: Any, path: str, columns: Tensor) -> Change:
    before = inputs_of(layer)
    if isinstance(layer, nn.RNNBase):
        for _, index, suffix in _suffixes(layer):
            if index == 0:
                setattr(layer, f"weight_ih{suffix}", narrowed(getattr(layer, f"weight_ih{suffix}"), 1, columns))
        layer.input_size = len(columns)
    else:
        layer.weight = narrowed(layer.weight, 1, columns)
        layer.in_features = len(columns)
    return Change(path=path, what="input channels", before=str(before), after=str(len(columns)), indirect=True)


def ignore_units(module: nn.Module, recurrent: Recurrent, kept: Tensor) -> None:
    """Set every weight to zero that reads a removed unit."""
    layer: Any = module.get_submodule(recurrent.path)
    width, directions = layer.hidden_size, 2 if layer.bidirectional else 1
    removed = torch.ones(len(kept), width, dtype=torch.bool)
    removed.scatter_(1, kept, False)
    with torch.no_grad():
        for row, index, suffix in _suffixes(layer):
            getattr(layer, f"weight_hh{suffix}")[:, removed[row]] = 0.0
            if index:
                below = removed[(index - 1) * directions : index * directions].flatten()
                getattr(layer, f"weight_ih{suffix}")[:, below] = 0.0
        for reader in recurrent.readers:
            for weight in _reading_weights(module.get_submodule(reader.path)):
                weight[:, reader.columns[removed.flatten()[reader.units]]] = 0.0


def find_recurrent(module: nn.Module, selection: LayerSelection, run: ModuleRun) -> tuple[list[Recurrent], list[Skip]]:
    """Find the recurrent layers that can shrink, each verified; and the others with the reason."""
    found, skipped, owners = [], [], parameter_owners(module)
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.RNNBase):
            continue
        refusal = _refusal(path, layer, selection, owners)
        recurrent = None if refusal else _find_readers(module, path, run)
        if recurrent is not None:
            refusal = _tied_reader(module, recurrent, owners) or _removal_refusal(module, recurrent, run)
            if refusal:
                recurrent = replace(recurrent, numbers=_width_attributes(module, path, layer.hidden_size))
                refusal = _removal_refusal(module, recurrent, run) if recurrent.numbers else refusal
        if refusal:
            skipped.append(refusal.skip(path))
        elif recurrent is not None:
            found.append(recurrent)
    return found, skipped


def _refusal(
    path: str, layer: nn.RNNBase, selection: LayerSelection, owners: Mapping[int, list[tuple[int, str]]]
) -> Refusal | None:
    if not selection.includes(path):
        return EXCLUDED
    reason = ""
    if layer.proj_size:
        reason = "it projects its hidden states (proj_size), which is not supported"
    elif layer.hidden_size < 2:
        reason = "it has only one hidden unit"
    elif other := {tensor.dtype for tensor in layer.parameters()} - {torch.float32, torch.float64}:
        reason = f"its weights are {str(other.pop()).removeprefix('torch.')}"
    elif any(name not in layer._parameters for name in layer._flat_weights_names):
        reason = "its weights are computed from other parameters (a parametrization)"
    return Refusal(reason, "unsupported") if reason else frozen_or_shared(layer, owners)


def _tied_reader(
    module: nn.Module, recurrent: Recurrent, owners: Mapping[int, list[tuple[int, str]]]
) -> Refusal | None:
    for reader in recurrent.readers:
        for name, tensor in module.get_submodule(reader.path)._parameters.items():
            if is_shared(tensor, owners):
                return Refusal(f"{reader.path}.{name}, which reads its output, is shared with another layer", "tied")
    return None


def _find_readers(module: nn.Module, path: str, run: ModuleRun) -> Recurrent:
    """Return the layer with its readers, found by tracing two assignments of numbers to its units."""
    layer: Any = module.get_submodule(path)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    count = rows * layer.hidden_size
    numbers = torch.arange(1, count + 1)
    assignments = [numbers, numbers.flip(0) + count]
    traces = [_numbers_by_column(module, layer, assignment.view(rows, -1), run) for assignment in assignments]
    readers = []
    for name in traces[0]:
        first, second = (values.get(name) for values in traces)
        if first is None or second is None or len(first) != len(second):
            continue
        units = first - 1
        columns = ((units >= 0) & (units < count) & (second == 2 * count - units)).nonzero().flatten()
        if len(columns):
            readers.append(HiddenReader(name, columns, units[columns]))
    importance = _importance_of_units(module, layer, rows, readers)
    return Recurrent(path, importance, tuple(readers))


def _numbers_by_column(module: nn.Module, layer: Any, numbers: Tensor, run: ModuleRun) -> dict[str, Tensor]:
    """Return the one whole number that each column of every Linear and recurrent layer reads, 0 where there is none.

    `numbers` (layers * directions, hidden units) are assigned to the units of the recurrent `layer`.
    """
    read: dict[str, Tensor] = {}

    def assign(_: nn.Module, _args: Any, output: Any) -> Any:
        sequence, state = output
        directions = 2 if layer.bidirectional else 1
        last = numbers[-directions:].flatten()

        def written(values: Tensor) -> Tensor:
            return last.to(values).expand_as(values).clone()

        def of_layers(values: Tensor) -> Tensor:
            each = numbers.to(values)
            return (each if values.dim() == 2 else each[:, None]).expand_as(values).clone()

        if isinstance(sequence, PackedSequence):
            sequence = sequence._replace(data=written(sequence.data))
        else:
            sequence = written(sequence)
        return sequence, tree_map(of_layers, state)

    def record(path: str) -> Hook:
        def hook(part: nn.Module, values: Any, _output: Any) -> None:
            values = values.data if isinstance(values, PackedSequence) else values
            if isinstance(values, Tensor) and values.shape[-1] == inputs_of(part):
                found = _constant(values.detach().reshape(-1, values.shape[-1]).cpu())
                known = read.get(path)
                read[path] = found if known is None else found * (found == known)

        return hook

    parts = {path: part for path, part in module.named_modules() if isinstance(part, (nn.Linear, nn.RNNBase))}
    hooks = {path: record(path) for path, part in parts.items() if part is not layer}
    try:
        with attached([layer.register_forward_hook(assign)]), forward_hooks(module, hooks, before=True):
            Probe.of(run).outputs(module)
    except DoesNotRun:
        return {}
    return read


def _constant(values: Tensor) -> Tensor:
    """Return for each column (columns,) of (rows, columns) the one whole number in it besides zeros, or 0."""
    values = values.double()
    largest = values.abs().max(0).values
    integers = largest.round()
    constant = ((values - integers).abs() <= INTEGER_TOLERANCE) | (values == 0)
    return torch.where(constant.all(0), integers, 0.0).long()


def _width_attributes(module: nn.Module, path: str, width: int) -> tuple[tuple[str, str], ...]:
    """Return the attributes of enclosing modules that hold the number of units."""
    parts = path.split(".")
    owners = [".".join(parts[:length]) for length in range(len(parts))]
    return tuple(
        (owner, name)
        for owner in owners
        for name, value in vars(module.get_submodule(owner)).items()
        if name in WIDTHS and type(value) is int and value == width
    )


def _removal_refusal(module: nn.Module, recurrent: Recurrent, run: ModuleRun) -> Refusal | None:
    """Return why the layer cannot lose half of its units, tried on copies; None if it can."""
    probe, keep = Probe.of(run), recurrent.width // 2
    ignoring, smaller = copy.deepcopy(module), copy.deepcopy(module)
    ignore_units(ignoring, recurrent, recurrent.best(keep))
    try:
        narrow_units(smaller, [(recurrent, keep)])
        outputs, expected = probe.outputs(smaller), probe.outputs(ignoring)
        apart = relative_difference(outputs, expected)
    except DoesNotRun as error:
        return Refusal(f"the model does not run with fewer hidden units: {error}", "forward_fails")
    except ValueError:
        return Refusal("its hidden units are outputs of the model", "model_output")
    if apart > tolerance_of(expected):
        mixed = "a later operation mixes its hidden units (a normalization or a matrix product over them)"
        return Refusal(mixed, "unsupported")
    return None
