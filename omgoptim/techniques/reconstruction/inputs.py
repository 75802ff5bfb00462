"""Inputs of layers on samples: batches, padding masks, hooks, and the rows that a weight is multiplied with.

A row is a vector of a Linear's input or a patch of a convolution's. `one_batch` joins as many samples as memory allows
into the one batch that layers are fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import NamedBatch, attached
from omgoptim.models.samples import Samples, as_tensors, batch_length, forward_args
from omgoptim.techniques.probe import Probe
from omgoptim.techniques.registry import ModuleRun

DenseLayer = nn.Linear | nn.Conv2d
T = TypeVar("T")

MASKS = ("attention_mask", "mask")
"""Names of inputs that mark the real positions of a sequence with 1 or True, as in Hugging Face models. Other masks are
not read: torch's `key_padding_mask` marks the padding instead.
"""

MAX_PATCHES = 256
"""Maximum patches of one sample, evenly spread. Chosen: neighbouring patches of an image are similar."""

BATCH = 16
"""Samples per forward. Chosen by memory: the gradients of the outputs have to fit."""

Hook = Callable[[nn.Module, Any, Any], None]
"""`hook(layer, input, output)`: the layer's first argument, and its output, which is None before the call."""

MAX_SAMPLES, MAX_ACTIVATIONS = 1024, 2**27
"""Maximum samples of the batch, and maximum values of its largest activation (512 MiB in float32). Chosen by memory."""


def chunks_by_size(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield the items in order in lists whose sizes add up to at most `limit`; a larger item is alone."""
    chunk: list[T] = []
    total = 0
    for item in items:
        more = size(item)
        if chunk and total + more > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append(item)
        total += more
    if chunk:
        yield chunk


def batches_of(samples: Samples, limit: int) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield the first `limit` samples in batches of at most `BATCH`."""
    remaining = limit
    for batch in samples.batches:
        size = min(remaining, batch_length(batch))
        for start in range(0, size, BATCH):
            yield {name: array[start : min(start + BATCH, size)] for name, array in batch.items()}
        remaining -= size
        if remaining <= 0:
            return


def call_tensors(batch: Mapping[str, np.ndarray[Any, Any]], run: ModuleRun) -> dict[str, Tensor]:
    """Return a batch as tensors on the run's device, in the signature's dtypes."""
    return {name: tensor.to(run.device) for name, tensor in as_tensors(dict(batch), run.signature.dtypes).items()}


def padding_mask(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mask (B, T), True for real positions, of a batch of padded sequences.

    None where no input of a name in `MASKS` has two dimensions and only values of 0 and 1, or where none or all of its
    positions are real.
    """
    mask = next((tensors[name] for name in MASKS if name in tensors), None)
    if mask is None or mask.dim() != 2 or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    real = mask != 0
    return real if bool(real.any()) and not bool(real.all()) else None


def unpadded_rows(values: Tensor, real: Tensor | None) -> Tensor:
    """Return (B, T, C) as (rows, C): the real positions where the mask (B, T) fits, else all."""
    if real is not None and values.dim() == 3 and values.shape[:2] == real.shape:
        return values[real]
    return values.reshape(-1, values.shape[-1])


def input_rows(layer: DenseLayer, values: Tensor, real: Tensor | None) -> Tensor:
    """Return the rows that the weight of each group is multiplied with, float64.

    Args:
        layer: the layer.
        values: its input, (*, in) of a Linear, (N, in, H, W) or (in, H, W) of a convolution.
        real: the batch's mask.

    Returns:
        (groups, rows, in of a group): in is in_features, or in / groups * kernel height * kernel width in the order of
        the weight. Padding of a convolution counts as zeros. At most `MAX_PATCHES` patches of a sample.
    """
    if isinstance(layer, nn.Linear):
        return unpadded_rows(values, real).double()[None]
    images = values if values.dim() == 4 else values[None]
    found = []
    for image in padded(layer, images):  # one at a time: patches take kernel height * width times an image's memory
        patches = patches_of(layer, image[None])[0]
        found.append(patches[:, sample_positions(patches.shape[1], patches.device)].double())
    patches = torch.cat(found, dim=1)
    return patches.reshape(layer.groups, -1, patches.shape[1]).mT


def rows_of_shape(layer: DenseLayer, shape: Sequence[int]) -> int:
    """Return how many rows `input_rows` gives for an input of this shape, padding included."""
    if isinstance(layer, nn.Linear):
        return math.prod(shape[:-1])
    left, right, above, below = layer._reversed_padding_repeated_twice
    sides = [
        (size + more - dilation * (kernel - 1) - 1) // stride + 1
        for size, more, dilation, kernel, stride in zip(
            shape[-2:], (above + below, left + right), layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return min(math.prod(sides), MAX_PATCHES) * (shape[0] if len(shape) == 4 else 1)


def output_rows(layer: DenseLayer, values: Tensor, real: Tensor | None) -> Tensor:
    """Return the rows of an output, or of its gradient: (groups, rows, out of a group), float64, all positions."""
    if isinstance(layer, nn.Linear):
        return unpadded_rows(values, real).double()[None]
    channels = values if values.dim() == 4 else values[None]
    flat = channels.double().movedim(1, 0).reshape(layer.groups, layer.out_channels // layer.groups, -1)
    return flat.mT


def sample_positions(count: int, device: torch.device) -> Tensor:
    """Return at most `MAX_PATCHES` of so many positions: all, or a fixed pseudo-random choice."""
    if count <= MAX_PATCHES:
        return torch.arange(count, device=device)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(count))[:MAX_PATCHES]
    return drawn.sort().values.to(device)


def padded(layer: nn.Conv1d | nn.Conv2d, images: Tensor) -> Tensor:
    """Pad an input (N, C, *size) as the layer does, to (N, C, H, W); H is 1 for a Conv1d."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    found = functional.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    return found.unsqueeze(2) if isinstance(layer, nn.Conv1d) else found


def patches_of(layer: nn.Conv1d | nn.Conv2d, images: Tensor) -> Tensor:
    """Return the patches of a `padded` input: (N, groups * F, positions), F in the order of one output's weight."""
    geometry: list[Any] = [
        (1, *value) if len(value) == 1 else value for value in (layer.kernel_size, layer.dilation, layer.stride)
    ]
    kernel, dilation, stride = geometry
    return functional.unfold(images, kernel, dilation, 0, stride)


class StopForward(BaseException):
    """Raised by a hook to end a forward; a BaseException, so that no `except Exception` of a model's code takes it."""


@contextmanager
def forward_hooks(module: nn.Module, hooks: Mapping[str, Hook], *, before: bool = False) -> Iterator[None]:
    """Call hooks with the inputs and outputs of layers for as long as the context is open.

    Args:
        module: holds the layers.
        hooks: path of a layer to its hook.
        before: call them before the layers run instead of after.
    """

    def adapted(hook: Hook) -> Callable[..., None]:
        def act(layer: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            hook(layer, args[0] if args else next(iter(kwargs.values()), None), output)

        return act

    kind = "register_forward_pre_hook" if before else "register_forward_hook"
    register = [(getattr(module.get_submodule(path), kind), adapted(hook)) for path, hook in hooks.items()]
    with attached(each(hook, with_kwargs=True) for each, hook in register):
        yield


def run_until_stopped(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run a module in eval mode, without gradients, until it ends or a hook raises `StopForward`."""
    try:
        with evaluation_mode(module):
            module(*args, **kwargs)
    except StopForward:
        pass


def one_batch(module: nn.Module, run: ModuleRun) -> Probe:
    """Return the call of `module` on that batch; sequences padded to several lengths are brought to one."""
    largest = 1

    def record(_layer: nn.Module, _args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor) and output.numel() and output.ndim:  # an expert may get no sample at all
            largest = max(largest, output[0].numel())

    hooks = [layer.register_forward_hook(record) for layer in module.modules()]
    with attached(hooks):
        Probe.of(run).outputs(module)
    probed = _padded_length(run.statistics.batches[0])

    def samples_at(length: int) -> int:
        return max(2, min(MAX_SAMPLES, MAX_ACTIVATIONS * probed // (largest * length)))

    batches = pad_to_one_length(run.statistics.batches, samples_at)
    samples = samples_at(probed if batches is run.statistics.batches else _padded_length(batches[0]))
    return Probe(*forward_args(run.signature, join_batches(batches, samples), run.device))


def _padded_length(batch: NamedBatch) -> int:
    """Return the length of padded sequences; 1 for a batch without a mask."""
    return next((batch[name].shape[-1] for name in MASKS if name in batch and batch[name].ndim), 1)


def join_batches(batches: list[NamedBatch], samples: int) -> NamedBatch:
    """Join the first `samples` of some batches into one batch.

    Batches of other sizes (texts of other lengths) are cut to those of the median batch; smaller ones are left out.
    """
    by_size = sorted(batches, key=lambda batch: sum(array[0].size for array in batch.values()))
    sizes = {name: array.shape[1:] for name, array in by_size[len(by_size) // 2].items()}
    taken: list[NamedBatch] = []
    count = 0
    for batch in batches:
        fits = all(
            all(length >= size for length, size in zip(array.shape[1:], sizes[name], strict=True))
            for name, array in batch.items()
        )
        if fits and count < samples:
            first = slice(0, samples - count)
            cut = {name: array[first][tuple(map(slice, (None, *sizes[name])))] for name, array in batch.items()}
            taken.append(cut)
            count += batch_length(cut)
    return {name: np.concatenate([batch[name] for batch in taken]) for name in taken[0]}


def pad_to_one_length(batches: list[NamedBatch], samples_at: Callable[[int], int]) -> list[NamedBatch]:
    """Pad shorter sequences with masked zeros, and cut longer ones.

    The length is the one that leaves most real positions: the longest, unless few samples are so long that all others
    would be mostly padding.

    Args:
        batches: with a mask (B, T) of 0 and 1 under a name in `MASKS`; T differs between batches.
        samples_at: how many samples fit into memory at a length.

    Returns:
        The batches as they are where there is no such mask, the lengths do not differ, or another input has a length
        that is not on its second axis.
    """
    name = next((name for name in MASKS if name in batches[0]), None)
    if name is None or not all(b[name].ndim == 2 and ((b[name] == 0) | (b[name] == 1)).all() for b in batches):
        return batches
    lengths = sorted({batch[name].shape[1] for batch in batches})
    if len(lengths) == 1:
        return batches
    real = np.concatenate([_resized(batch[name], lengths[-1]) for batch in batches]) != 0
    counts = real.cumsum(1).cumsum(0)  # of the first n samples up to position t

    def real_positions(length: int) -> int:
        return int(counts[min(len(real), samples_at(length)) - 1, length - 1])

    best = max(reversed(lengths), key=real_positions)
    fitted = [_resized_batch(batch, batch[name].shape[1], best) for batch in batches]
    shapes = [{key: array.shape[1:] for key, array in batch.items()} for batch in fitted]
    return fitted if all(shape == shapes[0] for shape in shapes) else batches


def _resized_batch(batch: NamedBatch, length: int, new: int) -> NamedBatch:
    return {
        name: _resized(array, new) if array.ndim > 1 and array.shape[1] == length else array
        for name, array in batch.items()
    }


def _resized(array: np.ndarray, length: int) -> np.ndarray:
    """Return an array (B, T, ...) with its second axis cut, or filled up with zeros, to a length."""
    missing = max(0, length - array.shape[1])
    return np.pad(array[:, :length], [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
