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
    pairs = [requested_pair(text, student, teacher) for text in requested] or infer_pairs(student, teacher, positions)
    if not pairs:
        raise TechniqueError(
            "no layers of the student and the teacher could be paired",
            "they have no repeated layers, no feature maps of the same kind and no layers at the same positions",
            "name the pairs by module path: feature_layers STUDENT=TEACHER",
        )
    for first, second in pairs:
        if len(first.grid) != len(second.grid) or first.sequence != second.sequence or (positions and not first.grid):
            raise TechniqueError(
                f"the outputs of layers '{first.path}' and '{second.path}' cannot be compared",
                f"the student's has shape {first.shape}, the teacher's {second.shape}",
                "pair maps with maps and sequences with sequences" + (", not vectors" if positions else ""),
            )
    return pairs


def split_pair(text: str) -> tuple[str, str]:
    """Return the student's and the teacher's path in `STUDENT=TEACHER`, or one path for both."""
    first, separator, second = text.partition("=")
    return first.strip(), (second if separator else first).strip()


def requested_pair(text: str, student: Trace, teacher: Trace) -> Pair:
    """Return the two layers that `STUDENT=TEACHER`, or one path for both, names.

    Raises:
        RequestError: one of them is no layer, or gives no tensor with the batch first.
    """
    student_path, teacher_path = split_pair(text)
    return find_layer(student_path, student, "student"), find_layer(teacher_path, teacher, "teacher")


def find_layer(path: str, traced: Trace, whose: str) -> LayerOutput:
    """Return the traced output of the layer at a path.

    Raises:
        RequestError: it is none, or gives no tensor with the batch first.
    """
    if path and path in traced.by_path:
        return traced.by_path[path]
    known = [layer.path for layer in traced.layers if layer.path]
    raise RequestError(
        f"the {whose} has no layer '{path}' with an output per sample",
        did_you_mean(path, known) or "none of its layers has one",
        "name a known layer as STUDENT=TEACHER, or one path for both",
    )


def infer_pairs(student: Trace, teacher: Trace, positions: bool = False) -> list[Pair]:
    """Return pairs by path and shape, in the order of the student's layers; empty if there are none.

    Output layers are left out unless there are no others.
    """
    strategies: tuple[Callable[[Trace, Trace], list[Pair]], ...] = (_pairs_of_stacks, _pairs_of_stages, _pairs_by_path)
    for strategy in strategies:
        pairs = [(first, second) for first, second in strategy(student, teacher) if first.grid or not positions]
        if pairs:
            inner = [(s, t) for s, t in pairs if not (s.final and t.final and s.shape == t.shape)]
            return inner or pairs  # the output loss compares main outputs anyway
    return []


def evenly(index: int, count: int, of: int) -> int:
    """Return the layer of `of` that corresponds to layer `index` of `count`: the last of its share."""
    return max(-(-(index + 1) * of // count) - 1, 0)


def _pairs_of_stacks(student: Trace, teacher: Trace) -> list[Pair]:
    """Return the blocks of the teacher's deepest stack, with the student's stack of the same path, class or depth."""
    teacher_stack = max(_stacks(teacher).values(), key=len, default=[])
    if len(teacher_stack) < 2:
        return []
    first = teacher_stack[0]

    def likeness(stack: list[LayerOutput]) -> tuple[bool, bool, int]:
        return stack[0].path.rstrip(DIGITS) == first.path.rstrip(DIGITS), stack[0].layer == first.layer, len(stack)

    student_stack = max(_stacks(student).values(), key=likeness, default=[])
    return [
        (block, teacher_stack[evenly(index, len(student_stack), len(teacher_stack))])
        for index, block in enumerate(student_stack)
    ]


def _stacks(traced: Trace) -> dict[tuple[str, str, tuple[int, ...]], list[LayerOutput]]:
    """Return the blocks whose paths differ in their last number, of one class, that give sequences of one shape."""
    stacks: dict[tuple[str, str, tuple[int, ...]], list[LayerOutput]] = {}
    for layer in traced.layers:
        if layer.sequence and layer.block and layer.path[-1:].isdecimal():
            stacks.setdefault((layer.path.rstrip(DIGITS), layer.layer, layer.shape), []).append(layer)
    return stacks


def _pairs_of_stages(student: Trace, teacher: Trace) -> list[Pair]:
    """Return the last layers of stages with maps of the same size; if there are none, of all stages, evenly."""
    student_ends, teacher_ends, student_layers = _stage_ends(student), _stage_ends(teacher), student.by_path
    pairs = []
    for grid, end in student_ends.items():
        other = teacher_ends.get(grid)
        if other is None:
            continue
        same = student_layers.get(other.path)
        pairs.append((same if same is not None and same.grid == grid else end, other))
    if pairs or not teacher_ends:
        return pairs
    ends = list(teacher_ends.values())
    spread = [
        (end, ends[evenly(index, len(student_ends), len(ends))]) for index, end in enumerate(student_ends.values())
    ]
    return [(end, other) for end, other in spread if len(end.grid) == len(other.grid)]


def _stage_ends(traced: Trace) -> dict[tuple[int, ...], LayerOutput]:
    """Return the last layer with parameters of each map size, without the module's output."""
    maps = [
        layer
        for layer in traced.layers
        if layer.grid and max(layer.grid) > 1 and not layer.sequence and not layer.final
    ]
    learnt = {layer.grid for layer in maps if layer.leaf}
    return {layer.grid: layer for layer in maps if layer.grid in learnt}


def _pairs_by_path(student: Trace, teacher: Trace) -> list[Pair]:
    """Return layers with parameters, by path and kind; if there are none, spread evenly."""
    student_layers, teacher_layers = (
        [layer for layer in traced.layers if layer.leaf and not layer.final] for traced in (student, teacher)
    )
    by_path = {layer.path: layer for layer in teacher_layers}
    same = [
        (layer, by_path[layer.path])
        for layer in student_layers
        if layer.path in by_path
        and (len(by_path[layer.path].grid), by_path[layer.path].sequence) == (len(layer.grid), layer.sequence)
    ]
    if same or not teacher_layers:
        return same
    pairs = [
        (layer, teacher_layers[evenly(index, len(student_layers), len(teacher_layers))])
        for index, layer in enumerate(student_layers)
    ]
    return [
        (first, second)
        for first, second in pairs
        if (len(first.grid), first.sequence) == (len(second.grid), second.sequence)
    ]


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
    for value in traced.layers:
        parent, dot, last = value.path.rpartition(".")
        names = next((names for names in NAMES if names[-1] == last), None)
        if names is None or any(part in parent.lower() for part in CROSS):
            continue
        query, key = (by_path.get(f"{parent}{dot}{name}") for name in names[:2])
        if query and key and value.sequence and query.grid == key.grid == value.grid:
            found[parent] = (query, key, value)
    return found
