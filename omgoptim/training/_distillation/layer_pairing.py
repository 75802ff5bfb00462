"""Pairing of student layers with teacher layers: as requested, or by path and shape.

In this order: blocks of a repeated stack of sequences (transformer layers), spread evenly; the last layer of each map
size (the stages of a convolutional network); any layers with parameters. Layers with the same path in both are paired
first. Query, key and value layers of attentions are found by the names that transformers give them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from omgoptim.errors import RequestError, TechniqueError, did_you_mean
from omgoptim.training.layer_trace import LayerOutput, Trace

DIGITS = "0123456789"

Pair = tuple[LayerOutput, LayerOutput]
"""Layer of the student, layer of the teacher."""

NAMES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("linear_q", "linear_k", "linear_v"),
    ("query_proj", "key_proj", "value_proj"),
    ("wq", "wk", "wv"),
    ("Wq", "Wk", "Wv"),
    ("q", "k", "v"),
)
"""Names of the query, key and value layers of one attention."""

CROSS = ("cross", "encdec", "encoder_attn")
"""Parts of module paths that mark cross-attention."""


def pairs_of(student: Trace, teacher: Trace, requested: Sequence[str], positions: bool = False) -> list[Pair]:
    """Return the requested pairs, or else pairs by path and shape.

    Args:
        student: layers and shapes of one forward.
        teacher: layers and shapes of one forward.
        requested: `STUDENT=TEACHER` by module path, or one path for both; empty: found.
        positions: whether only layers with positions (maps, sequences) will do.

    Raises:
        RequestError: a path that is requested for is not a layer of the module, or one that gives nothing to compare.
        TechniqueError: nothing could be paired, or a pair has grids of different kinds.
    """
    pairs = [requested_pair(text, student, teacher) for text in requested] or found_pairs(student, teacher, positions)
    if not pairs:
        raise TechniqueError(
            "no layers of the student and the teacher could be paired",
            "they have no repeated layers, no feature maps of the same kind and no layers at the same positions",
            "name the pairs by module path: feature_layers STUDENT=TEACHER",
        )
    for one, other in pairs:
        if len(one.grid) != len(other.grid) or one.sequence != other.sequence or (positions and not one.grid):
            raise TechniqueError(
                f"the outputs of layers '{one.path}' and '{other.path}' cannot be compared",
                f"the student's has shape {one.shape}, the teacher's {other.shape}",
                "pair maps with maps and sequences with sequences" + (", not vectors" if positions else ""),
            )
    return pairs


def two_paths(text: str) -> tuple[str, str]:
    """Return the student's and the teacher's path in `STUDENT=TEACHER`, or one path for both."""
    one, separator, other = text.partition("=")
    return one.strip(), (other if separator else one).strip()


def requested_pair(text: str, student: Trace, teacher: Trace) -> Pair:
    """Return the two layers that `STUDENT=TEACHER`, or one path for both, names.

    Raises:
        RequestError: one of them is no layer, or gives no tensor with the batch first.
    """
    one, other = two_paths(text)
    return layer_named(one, student, "student"), layer_named(other, teacher, "teacher")


def layer_named(path: str, traced: Trace, whose: str) -> LayerOutput:
    """Return the traced output of the layer at a path.

    Raises:
        RequestError: it is none, or gives no tensor with the batch first.
    """
    if path and path in traced.by_path:
        return traced.by_path[path]
    known = [seen.path for seen in traced.seen if seen.path]
    raise RequestError(
        f"the {whose} has no layer '{path}' with an output per sample",
        did_you_mean(path, known) or "none of its layers has one",
        "name a known layer as STUDENT=TEACHER, or one path for both",
    )


def found_pairs(student: Trace, teacher: Trace, positions: bool = False) -> list[Pair]:
    """Return pairs by path and shape, in the order of the student's layers; empty if there are none.

    Output layers are left out unless there are no others.
    """
    ways: tuple[Callable[[Trace, Trace], list[Pair]], ...] = (_stacked, _staged, _placed)
    for way in ways:
        pairs = [(one, other) for one, other in way(student, teacher) if one.grid or not positions]
        if pairs:
            return [pair for pair in pairs if not _is_output_pair(*pair)] or pairs
    return []


def _is_output_pair(one: LayerOutput, other: LayerOutput) -> bool:
    """Return whether both layers are the main outputs, which the output loss compares anyway."""
    return one.final and other.final and one.shape == other.shape


def evenly(index: int, count: int, of: int) -> int:
    """Return the layer of `of` that corresponds to layer `index` of `count`: the last of its share."""
    return max(-(-(index + 1) * of // count) - 1, 0)


def _stacked(student: Trace, teacher: Trace) -> list[Pair]:
    """Return the blocks of the teacher's deepest stack, with the student's stack of the same path, class or depth."""
    theirs = max(_stacks(teacher).values(), key=len, default=[])
    if len(theirs) < 2:
        return []
    first = theirs[0]

    def likeness(stack: list[LayerOutput]) -> tuple[bool, bool, int]:
        return stack[0].path.rstrip(DIGITS) == first.path.rstrip(DIGITS), stack[0].layer == first.layer, len(stack)

    mine = max(_stacks(student).values(), key=likeness, default=[])
    return [(block, theirs[evenly(index, len(mine), len(theirs))]) for index, block in enumerate(mine)]


def _stacks(traced: Trace) -> dict[tuple[str, str, tuple[int, ...]], list[LayerOutput]]:
    """Return the blocks whose paths differ in their last number, of one class, that give sequences of one shape."""
    stacks: dict[tuple[str, str, tuple[int, ...]], list[LayerOutput]] = {}
    for seen in traced.seen:
        if seen.sequence and seen.block and seen.path[-1:].isdecimal():
            stacks.setdefault((seen.path.rstrip(DIGITS), seen.layer, seen.shape), []).append(seen)
    return stacks


def _staged(student: Trace, teacher: Trace) -> list[Pair]:
    """Return the last layers of stages with maps of the same size; if there are none, of all stages, evenly."""
    mine, theirs, own = _stage_ends(student), _stage_ends(teacher), student.by_path
    pairs = []
    for grid, end in mine.items():
        other = theirs.get(grid)
        if other is None:
            continue
        same = own.get(other.path)
        pairs.append((same if same is not None and same.grid == grid else end, other))
    if pairs or not theirs:
        return pairs
    ends = list(theirs.values())
    spread = [(end, ends[evenly(index, len(mine), len(ends))]) for index, end in enumerate(mine.values())]
    return [(end, other) for end, other in spread if len(end.grid) == len(other.grid)]


def _stage_ends(traced: Trace) -> dict[tuple[int, ...], LayerOutput]:
    """Return the last layer with parameters of each map size, without the module's output."""
    maps = [seen for seen in traced.seen if seen.grid and max(seen.grid) > 1 and not seen.sequence and not seen.final]
    learnt = {seen.grid for seen in maps if seen.leaf}
    return {seen.grid: seen for seen in maps if seen.grid in learnt}


def _placed(student: Trace, teacher: Trace) -> list[Pair]:
    """Return layers with parameters, by path and kind; if there are none, spread evenly."""
    mine, theirs = ([seen for seen in traced.seen if seen.leaf and not seen.final] for traced in (student, teacher))
    of = {seen.path: seen for seen in theirs}
    same = [
        (seen, of[seen.path])
        for seen in mine
        if seen.path in of and (len(of[seen.path].grid), of[seen.path].sequence) == (len(seen.grid), seen.sequence)
    ]
    if same or not theirs:
        return same
    pairs = [(seen, theirs[evenly(index, len(mine), len(theirs))]) for index, seen in enumerate(mine)]
    return [(one, other) for one, other in pairs if (len(one.grid), one.sequence) == (len(other.grid), other.sequence)]


def attention_of(traced: Trace, requested: str | None, whose: str) -> tuple[LayerOutput, LayerOutput, LayerOutput]:
    """Return the query, key and value layers of a module's last self-attention, or of the requested one.

    Raises:
        RequestError: what is requested for is no such attention.
        TechniqueError: the module has none whose three are layers of their own.
    """
    found = _attentions(traced)
    if requested is not None:
        if requested in found:
            return found[requested]
        raise RequestError(
            f"'{requested}' is not a self-attention of the {whose} with separate query, key and value layers",
            did_you_mean(requested, found) or "it has none",
            "name the module that contains the three layers, as STUDENT=TEACHER, or one path for both",
        )
    if found:
        return list(found.values())[-1]
    raise TechniqueError(
        f"features minilm finds no query, key and value layers in the {whose}",
        f"'{traced.fused}' computes the three in one projection, which is not supported"
        if traced.fused is not None
        else f"no module has three layers with names such as {', '.join('/'.join(names) for names in NAMES[:3])}",
        "use features fitnets or relational instead",
    )


def _attentions(traced: Trace) -> dict[str, tuple[LayerOutput, LayerOutput, LayerOutput]]:
    """Return the three layers of each self-attention by path, in the order of execution."""
    by_path, found = traced.by_path, {}
    for value in traced.seen:
        parent, dot, last = value.path.rpartition(".")
        names = next((names for names in NAMES if names[-1] == last), None)
        if names is None or any(part in parent.lower() for part in CROSS):
            continue
        query, key = (by_path.get(f"{parent}{dot}{name}") for name in names[:2])
        if query and key and value.sequence and query.grid == key.grid == value.grid:
            found[parent] = (query, key, value)
    return found
