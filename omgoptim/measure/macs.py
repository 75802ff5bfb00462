"""Multiply-accumulates of one sample, counted twice and independently: by operator, and by module with thop.

The headline is the operators' count (`torch.utils.flop_counter`, its FLOPs / 2), because it sees what a model computes
however it is written: matmul, einsum, functional attention. It is completed in two places. PyTorch's attention kernel
for the CPU (pytorch/pytorch#195460) and nn.Bilinear have no formula there, and recurrent layers run in kernels that it
does not see, so theirs is computed from their weights. Biases, activations, normalisation and pooling are no
multiply-accumulates here.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from omgoptim.measure.self_time import evaluation_mode, module_paths, self_cost
from omgoptim.reports import CountDisagreement, MacsCheck

TOLERANCE = 0.01
"""Largest relative difference of the two counters that is not reported. Chosen: rounding against missed operators."""

CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
"""Recurrent cells, one step per call."""
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Transposed convolutions."""

NO_PRODUCTS = (
    nn.ModuleList,  # a parametrization: the layer that has it multiplies by the weight it computes
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.PReLU,
    nn.ParameterList,
    nn.ParameterDict,
)
"""Layers of torch.nn whose weights, of any number of dimensions, are looked up or multiplied element by element."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MacsCount:
    """The multiply-accumulates of one sample, on the float model."""

    macs: int | None
    """The headline; None if the model could not be counted by operator."""
    check: MacsCheck | None
    """Not for a program, which has one counter."""
    by_path: dict[str, int]
    """Path to multiply-accumulates for every module that ran, children not included; they add up to `macs`.

    Empty for a program.
    """
    uncounted: dict[str, str] = field(default_factory=dict)
    """Path to class of the layers of torch.nn that have weight matrices, ran and counted nothing: `macs` lacks them."""


@dataclass(frozen=True, slots=True)
class _OperatorCount:
    """Multiply-accumulates per path, without and with the formula of recurrent layers."""

    dispatched: dict[str, int]
    """Path to multiply-accumulates as the dispatcher sees them."""
    full: dict[str, int]
    """Path to multiply-accumulates, recurrent layers by formula."""
    empty: set[str]
    """Paths of modules that gave no values, such as an expert that no sample was sent to."""


def count_macs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MacsCount:
    """Count a model on example inputs, each time on a copy in eval mode; the model itself is not changed.

    Args:
        module: the float model.
        args: positional example inputs, the batch first.
        kwargs: example inputs by name, the batch first. The counts are divided by the batch.

    Returns:
        Both counts and where they disagree. A counter that cannot take the model gives None and a line in the log.
    """
    batch = batch_of(args, kwargs)
    operators = _attempt("torch.utils.flop_counter", _count_operators, module, args, kwargs)
    by_thop = _attempt("thop", _count_with_thop, module, args, kwargs)
    dispatched = {path: round(count / batch) for path, count in operators.dispatched.items()} if operators else {}
    full = {path: round(count / batch) for path, count in operators.full.items()} if operators else {}
    thop = {path: round(count / batch) for path, count in by_thop.items()} if by_thop is not None else {}
    check = MacsCheck(
        thop=sum(thop.values()) if by_thop is not None else None,
        dispatcher=sum(dispatched.values()) if operators else None,
        disagreements=_disagreements(module, thop, dispatched) if operators and by_thop is not None else [],
    )
    uncounted = _uncounted(module, full) if operators else {}
    uncounted = {path: kind for path, kind in uncounted.items() if path not in operators.empty}
    if uncounted:
        log.warning("no MACs were counted for %s", uncounted)
    return MacsCount(macs=sum(full.values()) if operators else None, check=check, by_path=full, uncounted=uncounted)


def _uncounted(module: nn.Module, counted: dict[str, int]) -> dict[str, str]:
    """Return the layers of torch.nn with a weight of two dimensions or more that ran and counted nothing."""
    return {
        path: type(part).__name__
        for path, part in module_paths(module)
        if counted.get(path) == 0
        and any(kind.__module__.startswith("torch.nn.modules.") for kind in type(part).__mro__[:-2])
        and not isinstance(part, NO_PRODUCTS)
        and any(weight.dim() > 1 for weight in part.parameters(recurse=False))
    }


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the size of the first dimension of the first input that has one; 1 if none has."""
    tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0)
    return max(1, next((tensor.shape[0] for tensor in tensors), 1))


def _attempt(name: str, counter: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a counter on a copy of the model and of its inputs; None if it raises."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # a model may print, so may thop
            warnings.simplefilter("ignore")
            copied = copy.deepcopy(module)
            own_args, own_kwargs = tree_map(_copied_leaf, (args, kwargs))
            with evaluation_mode(copied):
                return counter(copied, own_args, own_kwargs)
    except Exception as error:  # noqa: BLE001 - a counter runs the user's forward under hooks: a count less, not a crash
        log.warning("%s cannot count this model: %s: %s", name, type(error).__name__, error)
        return None


def _copied_leaf(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


# By operator


def _count_operators(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _OperatorCount:
    """Count multiply-accumulates per path by dispatched operator, and recurrent layers by formula."""
    counter = FlopCounterMode(display=False, custom_mapping=_missing_formulas())
    filled: set[str] = set()
    paths = dict(module_paths(module))

    def look(path: str) -> Callable[..., None]:
        return lambda _part, _args, output: filled.add(path) if _has_values(output) else None

    for path, part in paths.items():  # of a copy
        part.register_forward_hook(look(path))
    with counter, _recurrent_layers(module) as recurrent, self_cost(module, counter.get_total_flops) as flops:
        module(*args, **kwargs)
    dispatched = {path: int(cost) // 2 for path, cost in flops.items()}
    return _OperatorCount(dispatched, dispatched | recurrent, paths.keys() - filled)


def _has_values(output: Any) -> bool:
    return any(not isinstance(leaf, torch.Tensor) or leaf.numel() > 0 for leaf in tree_leaves(output))


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Return FLOP formulas of operators that this torch lacks, from the shapes of their arguments."""
    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten.mv: _vector_flops,
        aten.addmv: lambda _added, matrix, *_, **__: _vector_flops(matrix),
        aten.dot: _vector_flops,
        aten._trilinear: _trilinear_flops,
    }
    return {operator: formula for operator, formula in formulas.items() if operator not in flop_registry}


def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    """Count scores and their product with the values: query (B, H, L, E), key (B, G, S, E), value (B, G, S, V)."""
    *heads, length, width = query
    return 2 * prod(heads) * length * key[-2] * (width + value[-1])


def _vector_flops(first: tuple[int, ...], *_: object, **__: object) -> int:
    """Count a matrix (M, N) or a vector (N,) times a vector (N,)."""
    return 2 * prod(first)


def _trilinear_flops(
    first: tuple[int, ...],
    weight: tuple[int, ...],
    second: tuple[int, ...],
    expand_first: Sequence[int],
    expand_weight: Sequence[int],
    expand_second: Sequence[int],
    *_: object,
    **__: object,
) -> int:
    """Count a bilinear form: every weight once for every row, operands broadcast along the expanded dimensions."""
    sizes_of_axes = [1] * (len(weight) + len(expand_weight))
    for shape, expanded in ((first, expand_first), (weight, expand_weight), (second, expand_second)):
        sizes = iter(shape)
        here = [1 if axis in expanded else next(sizes) for axis in range(len(sizes_of_axes))]
        sizes_of_axes = [max(one, other) for one, other in zip(sizes_of_axes, here, strict=True)]
    return 2 * prod(sizes_of_axes)


@contextlib.contextmanager
def _recurrent_layers(module: nn.Module) -> Iterator[dict[str, int]]:
    """Return a dict of path to multiply-accumulates of RNN, LSTM and GRU that fills as the model is called."""
    counts: dict[str, int] = {}

    def counting(path: str) -> Callable[..., None]:
        def hook(layer: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
            steps = args[0] if args else kwargs["input"]
            counts[path] = counts.get(path, 0) + recurrent_macs(layer, steps)

        return hook

    with contextlib.ExitStack() as stack:
        for path, part in module_paths(module):
            if isinstance(part, nn.RNNBase):
                stack.callback(part.register_forward_hook(counting(path), with_kwargs=True).remove)
        yield counts


def recurrent_macs(layer: nn.RNNBase, steps: torch.Tensor | PackedSequence) -> int:
    """Count an RNN, LSTM or GRU: at every step of every sequence each weight is used exactly once.

    Args:
        layer: any number of layers, one or both directions, with or without projection.
        steps: its input, (L, B, I), (B, L, I) or (L, I), or packed; padding that packing removed is not counted.
    """
    data = steps.data if isinstance(steps, PackedSequence) else steps
    matrices = [weight for weights in layer.all_weights for weight in weights if weight.dim() == 2]
    return (data.numel() // data.shape[-1]) * sum(weight.numel() for weight in matrices)


# By module


def _count_with_thop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Count by thop's rules, one hook per module; its `profile` takes no keyword arguments and returns no paths."""
    rules = _thop_rules()
    ruled = [(path, part, rules[type(part)]) for path, part in module_paths(module) if type(part) in rules]
    for _, part, rule in ruled:
        part.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        part.register_forward_hook(_with_all_inputs(rule), with_kwargs=True)
    module(*args, **kwargs)
    return {path: round(part.get_buffer("total_ops").item()) for path, part, _ in ruled}


def _with_all_inputs(rule: Callable[..., None]) -> Callable[..., None]:
    """Pass the inputs given by name after the positional ones: thop reads only the latter."""
    return lambda part, args, kwargs, output: rule(part, (*args, *kwargs.values()), output)


def _thop_rules() -> dict[type[nn.Module], Callable[..., None]]:
    with contextlib.suppress(ImportError):
        importlib.import_module("setuptools")  # brings the distutils that thop imports, which Python 3.12 lacks
    rules: dict[type[nn.Module], Callable[..., None]] = importlib.import_module("thop.profile").register_hooks
    return rules


# The two against each other


def _disagreements(module: nn.Module, thop: dict[str, int], dispatched: dict[str, int]) -> list[CountDisagreement]:
    """Return the modules where the counters differ by more than `TOLERANCE`, the largest difference first."""
    found = []
    for path, part in module_paths(module):
        by_thop, by_operator = thop.get(path, 0), dispatched.get(path, 0)
        if abs(by_thop - by_operator) > TOLERANCE * max(by_thop, by_operator):
            reason = _reason(part, by_thop, by_operator)
            kind = type(part).__name__
            found.append(CountDisagreement(path=path, kind=kind, thop=by_thop, dispatcher=by_operator, reason=reason))
    return sorted(found, key=lambda entry: -abs(entry.thop - entry.dispatcher))


def _reason(part: nn.Module, by_thop: int, by_operator: int) -> str:
    if isinstance(part, nn.RNNBase) and by_operator == 0:
        return "torch does not count inside the fused recurrent kernel; macs includes it, computed from the weights"
    if isinstance(part, (nn.RNNBase, *CELLS)):
        return "thop adds biases and the element-wise work of the gates"
    if isinstance(part, TRANSPOSED):
        return "thop counts a transposed convolution per output position; its MACs are per input position"
    if by_operator == 0:
        return "thop counts normalization, activation, pooling and resizing as MACs; they have no matrix product"
    if by_thop == 0:
        return (
            "thop does not count it: it has no rule for this type, or the operation is functional (attention, matmul)"
        )
    return "thop's rule for this type does not cover all operations of its forward"
