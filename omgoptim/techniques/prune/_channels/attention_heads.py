"""Attention heads: the layers that hold them, found by running the model rather than by layer names.

An attention block is a module with an attribute for the number of heads or their width, whose projections are separate
Linears for queries, keys and values or one fused Linear. Which part of the weight is which is found by experiment: with
the values of one head at zero, exactly that head's columns of the output projection read zeros. With grouped-query
attention (fewer heads of keys and values), a unit is one key-value head with all of its query heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from omgoptim.models.forward import attached
from omgoptim.reports import Skip
from omgoptim.techniques.probe import DoesNotRun, Probe
from omgoptim.techniques.prune._channels.groups import Count, Group, Place

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "nheads", "num_head", "h")
KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
HEAD_WIDTHS = ("head_dim", "attention_head_size", "dim_head", "d_head", "head_size", "dim_per_head", "d_k")
"""Attribute names that attention blocks use, in the order in which they are looked for."""

MAX_LINEARS = 8
"""Maximum number of Linears in an attention block. Chosen: a module with more is a model or a stack of blocks."""

UNKNOWN = "it looks like attention, but the weights that belong to each head could not be identified"
MULTIHEAD = "the width of torch.nn.MultiheadAttention equals the model's embed_dim: its heads cannot be removed"


@dataclass(frozen=True, slots=True)
class Attention:
    """Heads of one block as a group, and the layers that no other group may cut."""

    group: Group
    claimed: frozenset[str]


def find_heads(module: nn.Module, probe: Probe) -> tuple[list[Attention], list[Skip]]:
    """Find the attention blocks whose heads can be separated, and the others with the reason."""
    found: list[Attention] = []
    skipped: list[Skip] = []
    claimed: set[str] = set()
    for path, block in reversed(list(module.named_modules())):  # a block inside another one first
        if isinstance(block, nn.MultiheadAttention):
            skipped.append(Skip(path=path, reason=MULTIHEAD, kind="unsupported"))
        elif _number(block, HEAD_COUNTS) or _number(block, HEAD_WIDTHS):
            linears = _linears(path, block)
            if not 1 <= len(linears) <= MAX_LINEARS or claimed & linears.keys():
                continue
            attention = _heads_of(module, path, block, linears, probe)
            if attention is not None:
                found.append(attention)
                claimed |= attention.claimed
            elif any(type(child) is nn.Linear for child in block.children()):
                skipped.append(Skip(path=path, reason=UNKNOWN, kind="unsupported"))
    return found[::-1], skipped[::-1]


def _linears(path: str, block: nn.Module) -> dict[str, nn.Linear]:
    return {
        f"{path}.{name}" if path else name: layer for name, layer in block.named_modules() if type(layer) is nn.Linear
    }


def _number(block: nn.Module, names: Sequence[str]) -> int:
    values = (vars(block).get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Rows of the value and of all three projections, by unit of heads."""

    values: str
    value_rows: Tensor
    """(units, rows of a unit)."""
    parts: tuple[tuple[str, Tensor], ...]
    """Path of a Linear and its rows (units, rows of a unit)."""
    width: int
    """Columns of the output projection."""
    heads: int


def _heads_of(
    module: nn.Module, path: str, block: nn.Module, linears: dict[str, nn.Linear], probe: Probe
) -> Attention | None:
    tried: dict[tuple[str, bytes], str | None] = {}
    for layout in _layouts(block, linears):
        units = len(layout.value_rows)
        key = (layout.values, layout.value_rows.numpy().tobytes())
        if key not in tried:
            try:
                tried[key] = _reader(module, layout, probe)
            except DoesNotRun:
                tried[key] = None
        reader = tried[key]
        if reader is None or units < 2 or any(reader == name for name, _ in layout.parts):
            continue
        columns = torch.arange(layout.width).view(units, -1)
        unit = columns.shape[1]
        places = [Place(name, "out", rows.flatten(), _root_channels(rows, unit)) for name, rows in layout.parts]
        places.append(Place(reader, "in", columns.flatten(), columns.flatten()))
        claimed = frozenset(name for name, _ in layout.parts)
        counts = _counts(path, block, layout, linears)
        group = Group(layout.parts[0][0], layout.width, unit, "heads", tuple(places), heads=layout.heads, counts=counts)
        return Attention(group, claimed)
    return None


def _root_channels(rows: Tensor, unit: int) -> Tensor:
    """Return the root channel of every row: the one at the same place of its unit, or the nearest before it."""
    units, each = rows.shape
    within = torch.arange(each) * unit // each if each < unit else torch.arange(each) % unit
    return (torch.arange(units).unsqueeze(1) * unit + within).flatten()


def _layouts(block: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[_Layout]:
    """Yield possible roles of the block's Linears, most likely first."""
    heads, head_width = _number(block, HEAD_COUNTS), _number(block, HEAD_WIDTHS)
    for name, layer in linears.items():
        if layer.out_features % 3 == 0:
            width = layer.out_features // 3
            count = heads or (width // head_width if width % head_width == 0 else 0)
            if count > 1 and width % count == 0:
                order = torch.arange(layer.out_features)
                thirds = order.view(3, count, -1).transpose(0, 1)  # queries of all heads, keys, values
                in_turn = order.view(count, 3, -1)  # of each head its query, key and value
                for by_head in (thirds, in_turn):
                    yield _Layout(name, by_head[:, 2], ((name, by_head.flatten(1)),), width, count)
    names = list(linears)
    for query, key, value in permutations(names, 3):
        wide, narrow = linears[query].out_features, linears[key].out_features
        twice = wide == narrow and names.index(query) > names.index(key)  # the two are alike, and were tried
        if linears[value].out_features != narrow or wide % narrow or twice:
            continue
        count = heads if heads and wide % heads == 0 else wide // head_width if head_width else 0
        if count < 1 or wide % count or narrow % (wide // count):
            continue
        units = narrow // (wide // count)
        parts = [(n, torch.arange(linears[n].out_features).view(units, -1)) for n in (query, key, value)]
        yield _Layout(value, parts[2][1], tuple(parts), wide, count)


def _reader(module: nn.Module, layout: _Layout, probe: Probe) -> str | None:
    """Find the output projection: with one unit's values at zero, it reads zeros in that unit's columns only."""
    readers: set[str] | None = None
    units = len(layout.value_rows)
    for index in sorted({0, units - 1}):
        columns = torch.zeros(layout.width, dtype=torch.bool)
        columns.view(units, -1)[index] = True
        found = {
            name
            for name, zeros in _zero_columns(module, layout.values, layout.value_rows[index], layout.width, probe)
            if torch.equal(zeros, columns)
        }
        readers = found if readers is None else readers & found
    return next(iter(readers)) if readers and len(readers) == 1 else None


def _zero_columns(module: nn.Module, values: str, rows: Tensor, width: int, probe: Probe) -> list[tuple[str, Tensor]]:
    """Return the columns (width,) that the Linears read as zeros when some outputs of a layer are zero."""
    seen: list[tuple[str, Tensor]] = []

    def zero_outputs(_layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.index_fill(-1, rows.to(output.device), 0.0)

    def record(name: str) -> Any:
        def hook(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape[-1] == width:
                seen.append((name, (args[0].reshape(-1, width) == 0).all(0).cpu()))

        return hook

    hooks = [module.get_submodule(values).register_forward_hook(zero_outputs)]
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear and layer.in_features == width:
            hooks.append(layer.register_forward_pre_hook(record(name)))
    with attached(hooks):
        probe.outputs(module)
    return seen


def _counts(path: str, block: nn.Module, layout: _Layout, linears: dict[str, nn.Linear]) -> tuple[Count, ...]:
    """Return the block's attributes that depend on its heads: their number and their total width."""
    units = len(layout.value_rows)
    heads = _number(block, HEAD_COUNTS)
    widths = {layout.width, *(linears[name].out_features for name, _ in layout.parts)}
    total_names = ("all_head_size", "inner_dim", "attn_dim", "inner_size", "all_head_dim", "attention_dim", "proj_dim")
    return tuple(
        Count(path, name, value)
        for name, value in vars(block).items()
        if type(value) is int
        and (
            (name in HEAD_COUNTS and value == heads)
            or (name in KEY_COUNTS and value % units == 0)
            or (name in total_names and value in widths)
        )
    )
