"""Binding of the user's batches to a model's forward: input names, the signature, and the first call."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omgoptim.errors import DataError, ModelError
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature, flatten, structure_of

NamedBatch = dict[str, NDArray[Any]]


def name_inputs(module: nn.Module | None, raw: Any, names: Sequence[str] = ()) -> list[tuple[str, Tensor, bool]]:
    """Return name, tensor and whether it is passed by keyword, for each input of one batch of user data.

    A mapping is passed by name, in the order of `forward`'s parameters; a tuple or list by position; a tensor as the
    first argument, and so is the one entry of a mapping where there is one argument. Keys that `forward` does not take
    are left out.

    Args:
        module: whose forward it is for; None for a program, whose input `names` are then given.
        raw: one batch: a tensor, a tuple or list, or a mapping by input name.
        names: the inputs of a program, in order; not used for a module.
    """
    parameters = list(inspect.signature(module.forward).parameters.values()) if module is not None else []
    if isinstance(raw, Mapping):
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = {p.name for p in parameters} | set(names)
        keys = [key for key in raw if (takes_any or key in known) and raw[key] is not None]
        if not keys and len(raw) == 1 == len(known):  # one input under a name of the data's own
            return name_inputs(module, next(iter(raw.values())), names)
        if not keys:
            raise DataError(
                "no key of the data's batches is an argument of the model's forward",
                f"the batches have {', '.join(map(str, raw))}; the model takes {', '.join(sorted(known))}",
            )
        order = [*(p.name for p in parameters), *names]
        keys.sort(key=lambda key: order.index(key) if key in order else len(order))
        return [(str(key), as_tensor(raw[key], str(key)), True) for key in keys]
    values = list(raw) if isinstance(raw, (tuple, list)) else [raw]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)] or list(names)
    variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    while variadic and len(positional) < len(values):
        positional.append(f"{variadic}_{len(positional)}")
    if len(values) > len(positional):
        raise DataError(
            f"the data's batches have {len(values)} inputs, and the model takes {len(positional)}",
            f"it takes {', '.join(positional)}; the last element of a batch is the target",
            "yield (inputs, target), inputs as a tensor, a tuple with one entry per argument of forward, or a dict; "
            "pass a list of tensors as separate arguments",
        )
    return [(name, as_tensor(value, name), False) for name, value in zip(positional, values, strict=False)]


def as_tensor(value: Any, name: str) -> Tensor:
    """Convert an input to a tensor: a tensor, an array or a (nested) list of numbers."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"input '{name}' is a {type(value).__name__}", "inputs must be tensors or arrays") from error


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Copy a tensor to an array; bfloat16 as float32."""
    tensor = tensor.detach().cpu()
    return np.array((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())


def input_tensors(batches: Sequence[list[tuple[str, Tensor, bool]]]) -> tuple[InputTensor, ...]:
    """Describe the inputs: dimension 0 is the batch; a dimension that differs between batches is dynamic.

    Raises:
        DataError: batches differ in their inputs, or an input in its dtype or its number of dimensions.
    """
    names = [name for name, _, _ in batches[0]]
    other = next((found for batch in batches if (found := [name for name, _, _ in batch]) != names), None)
    if other is not None:
        raise DataError("batches have different inputs", f"one has {', '.join(names)}; another {', '.join(other)}")
    inputs = []
    for index, (name, tensor, keyword) in enumerate(batches[0]):
        if tensor.ndim == 0:
            raise DataError(f"input '{name}' is a scalar", "every input needs a batch dimension as its first")
        shapes = [batch[index][1].shape for batch in batches]
        kinds = {f"{batch[index][1].dtype} with {batch[index][1].ndim} dimensions" for batch in batches}
        if len(kinds) > 1:
            raise DataError(
                f"dtype or dimensions of input '{name}' differ between batches", " and ".join(sorted(kinds))
            )
        shape = [
            size if all(s[axis] == size for s in shapes) else f"{name}_{axis}" for axis, size in enumerate(tensor.shape)
        ]
        inputs.append(InputTensor(name, str(tensor.dtype).removeprefix("torch."), (BATCH, *shape[1:]), keyword))
    return tuple(inputs)


def first_forward(module: nn.Module, inputs: tuple[InputTensor, ...], batch: Mapping[str, Tensor]) -> Signature:
    """Run the model once and derive the structure of its outputs.

    Raises:
        ModelError: the forward raises (with the innermost layer that did), returns no tensors, or gives NaN.
    """
    called = Signature(inputs, "tensor")
    args, kwargs = called.to_call(batch)
    try:
        with running_layers(module) as inside, torch.inference_mode():
            result = module(*args, **kwargs)
    except Exception as error:  # whatever the user's forward raises
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        message = lines[0] if lines else type(error).__name__
        message = message if isinstance(error, RuntimeError) or not lines else f"{type(error).__name__}: {message}"
        shapes = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}{tuple(t.shape)}" for name, t in batch.items())
        place = f"layer '{inside[-1]}'" if inside and inside[-1] else "its forward method"
        raise ModelError(
            f"the model does not run on its inputs: {place} failed",
            f"{message}; inputs: {shapes}",
            "check the shapes and dtypes of the data or of the argument inputs; the run's log has the traceback",
        ) from error
    try:
        structure = structure_of(result)
    except TypeError as error:
        raise ModelError(
            "the model's output cannot be measured",
            str(error),
            "wrap the model in a module that returns tensors, or tuples, lists or dicts of tensors",
        ) from error
    leaves = flatten(result)
    if not leaves:
        raise ModelError(
            "the model returned no tensor",
            f"it returned {type(result).__name__}",
            "return a tensor, or a tuple, list or dict of tensors",
        )
    refuse_nan([leaf for leaf in leaves if isinstance(leaf, Tensor)], "the model's outputs")
    return Signature(inputs, structure)


@contextmanager
def attached(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        yield


@contextmanager
def running_layers(module: nn.Module) -> Iterator[list[str]]:
    """Yield the paths of the layers whose forward is running, the innermost last; after an error, where it was."""
    inside: list[str] = []

    def leave(_layer: nn.Module, _args: Any, _output: Any) -> None:
        inside.pop()

    layers = list(module.named_modules())
    hooks = [layer.register_forward_pre_hook(lambda _m, _a, path=path: inside.append(path)) for path, layer in layers]
    with attached([*hooks, *(layer.register_forward_hook(leave) for _, layer in layers)]):
        yield inside


def refuse_nan(tensors: Sequence[Tensor], what: str) -> None:
    """Raise a ModelError if a floating tensor holds NaN: a NaN is a failure, never an agreement."""
    for tensor in tensors:
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise ModelError(
                f"{what} contain NaN",
                f"{int(torch.isnan(tensor).sum())} of {tensor.numel()} values are NaN",
                "check the weights and the range of the inputs before compressing",
            )
