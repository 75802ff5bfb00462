"""Query, key and value layers of attentions, found by the names that transformers give them."""

from __future__ import annotations

from torch import nn

from omgoptim.errors import RequestError, TechniqueError, did_you_mean
from omgoptim.training._features.layer_trace import LayerOutput, Trace

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

FUSED = ("in_proj", "qkv", "c_attn", "Wqkv", "query_key_value", "qkv_proj")
"""Names of fused layers that compute all three at once."""

CROSS = ("cross", "encdec", "encoder_attn")
"""Parts of module paths that mark cross-attention."""


def attention_of(
    module: nn.Module, traced: Trace, asked: str | None, whose: str
) -> tuple[LayerOutput, LayerOutput, LayerOutput]:
    """Return the query, key and value layers of a module's last self-attention, or of the requested one.

    Raises:
        RequestError: what is asked for is no such attention.
        TechniqueError: the module has none whose three are layers of their own.
    """
    found = _attentions(traced)
    if asked is not None:
        if asked in found:
            return found[asked]
        raise RequestError(
            f"'{asked}' is not a self-attention of the {whose} with query, key and value layers",
            did_you_mean(asked, found) or "it has none",
            "name the module that holds the three, as STUDENT=TEACHER, or one path for both",
        )
    if found:
        return list(found.values())[-1]
    fused = _fused(module)
    raise TechniqueError(
        f"minilm finds no queries, keys and values in the {whose}",
        f"'{fused}' computes all three in one, which is not supported"
        if fused is not None
        else f"no layer of it has three layers called {', '.join('/'.join(names) for names in NAMES[:3])} or so",
        "use features fitnets or relational",
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


def _fused(module: nn.Module) -> str | None:
    """Return the path of the last layer that computes queries, keys and values in one."""
    last = None
    for path, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            last = f"{path}.in_proj_weight" if path else "in_proj_weight"
        elif path.rpartition(".")[2] in FUSED:
            last = path
    return last
