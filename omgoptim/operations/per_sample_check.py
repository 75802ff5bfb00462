"""Check that a module with changed shapes runs on every sample that the original runs on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from omgoptim.errors import TechniqueError
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import NamedBatch
from omgoptim.models.samples import Samples, batch_length, forward_args
from omgoptim.runtimes.signature import Signature, flatten
from omgoptim.techniques.probe import error_location, quiet_output
from omgoptim.training.modes import eval_mode

LONGEST_S, FEWEST = 20.0, 32
"""Time limit in seconds, once the minimum number of samples was run; for slow models."""

PATH = "some inputs use a path through the model that needs the removed channels"

Shapes = list[tuple[int, ...]]


def refuse_partial(
    module: nn.Module, original: nn.Module, samples: Samples, signature: Signature, device: str = "cpu"
) -> int:
    """Raise where a module fails on a sample for which the original runs, or gives outputs of other shapes.

    Nothing is run where all parameters have the shapes of the original's.

    Args:
        module: the changed module.
        original: the module before.
        samples: run with batch size 1, first those at even distances.
        signature: inputs and outputs of both.
        device: that both are on.

    Returns:
        How many samples were run.

    Raises:
        TechniqueError: with the number of samples that fail and the first failure.
    """
    if _shapes(module) == _shapes(original):
        return 0
    began, done, failures = time.monotonic(), 0, []
    with eval_mode(module, device), eval_mode(original, device):
        for one in _spread(samples):
            if done >= FEWEST and time.monotonic() - began > LONGEST_S:
                break
            done += 1
            shapes = _outputs(module, signature, one, device)
            if isinstance(shapes, str) or done <= FEWEST:
                expected = _outputs(original, signature, one, device)
                if shapes != expected and not isinstance(expected, str):
                    other = f"its outputs have shapes {shapes} instead of {expected}: they depend on values, or on what"
                    failures.append(f"{shapes}; {PATH}" if isinstance(shapes, str) else f"{other} was removed")
    if failures:
        raise TechniqueError(
            f"the smaller model fails on {len(failures)} of {done} samples that the original runs on",
            failures[0],
            "name the layers on that path, and those before it, in ignore",
        )
    return done


def _outputs(module: nn.Module, signature: Signature, one: NamedBatch, device: str) -> Shapes | str:
    """Return the shapes of the outputs for one sample, or the failure of the forward pass."""
    args, kwargs = forward_args(signature, one, device)
    try:
        with evaluation_mode(module), quiet_output(), torch.no_grad():
            result = module(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - whatever a user's forward raises once widths have changed
        return error_location(error)
    return [tuple(leaf.shape) for leaf in flatten(result) if isinstance(leaf, Tensor)]


def _spread(samples: Samples) -> Iterator[NamedBatch]:
    """Yield every sample as a batch of 1, evenly spaced ones first."""
    places = [(index, row) for index, batch in enumerate(samples.batches) for row in range(batch_length(batch))]
    step = max(len(places) // FEWEST, 1)
    for index, row in itertools.chain.from_iterable(places[start::step] for start in range(step)):
        yield {name: array[row : row + 1] for name, array in samples.batches[index].items()}


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
