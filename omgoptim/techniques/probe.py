"""Probe of a module on a few samples: its outputs, their comparison, and the place of an error in the user's code."""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from omgoptim.errors import OmgoptimError, TechniqueError
from omgoptim.measure.self_time import evaluation_mode
from omgoptim.models.forward import attached
from omgoptim.models.samples import forward_args, repeat_to_size
from omgoptim.runtimes.signature import flatten
from omgoptim.techniques.registry import ModuleRun, Refusal

SAMPLES = 2
"""Samples of a probe's batch: with one, batch dimensions and fixed sizes of 1 could not be distinguished."""
TOLERANCE, COARSE_TOLERANCE = 3e-4, 2e-2
"""Tolerance for two outputs that differ only in the order of additions, relative to the largest value: in float32 on a
CPU, 5,000 roundings of 6e-8; in half precision, and on GPUs, which may round the factors of float32 products to 10 bits
(TF32), 40 roundings of 5e-4.
"""

MAX_GROWTH = 8
"""Positions of an axis at most, as a multiple of the largest activation or axis: a reshape permutes and repeats."""

MAX_STEPS_PER_EDGE = 8
"""Steps of a walk at most, as a multiple of the graph's edges: at most 1.6 on ten networks that are followed."""

FOLD = "(a parametrization: fold it with torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm)"
"""Fix for a parametrized weight, for the end of a reason."""

NOT_RUN = Refusal(
    "it was not called for the samples that were tried: forward never calls it, or only for some inputs", "not_run"
)
"""Reason for skipping a layer that a trace did not meet."""

EXCLUDED = Refusal("excluded by targets or ignore", "excluded")

WHOLE_MODEL = Refusal("the model itself is this one layer", "unsupported")
"""Reason for not replacing a layer that no module holds."""

LIBRARIES = ("torch", "omgoptim", "torch_pruning")
"""Packages whose frames are left out of an error's location."""


class DoesNotRun(Exception):
    """A module that raises on inputs that it took before; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Calls of a module on one batch and on further samples."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    further_calls: tuple[tuple[tuple[Tensor, ...], dict[str, Tensor]], ...] = ()
    """Further calls: samples for which other layers run than for the batch."""

    @staticmethod
    def of(run: ModuleRun) -> Probe:
        """Create a probe on two samples."""
        return Probe(*forward_args(run.signature, repeat_to_size(run.statistics, SAMPLES), run.device))

    @property
    def samples(self) -> int:
        """Number of samples in a call."""
        return len(next(iter([*self.args, *self.kwargs.values()])))

    def outputs(self, module: nn.Module) -> list[Tensor]:
        """Return the module's output tensors in eval mode, call by call, with a fixed random seed.

        Raises:
            DoesNotRun: the forward raised.
        """
        with evaluation_mode(module), quiet_output(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                results = [module(*args, **kwargs) for args, kwargs in ((self.args, self.kwargs), *self.further_calls)]
            except Exception as error:  # whatever a user's forward raises once widths have changed
                raise DoesNotRun(error_location(error)) from error
        return [leaf for result in results for leaf in flatten(result) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, slots=True)
class LayerCalls:
    """Calls of a layer in one forward."""

    shapes: tuple[tuple[int, ...], ...]
    """Input shape of each call, at the traced batch size."""
    sources: tuple[int, ...]
    """Identity of each call's input: equal for layers with the same input tensor."""
    samples: int
    """Traced batch size."""


def layer_calls(
    module: nn.Module, layers: Mapping[str, nn.Module], run: ModuleRun, samples: int = SAMPLES
) -> dict[str, LayerCalls]:
    """Return the calls of layers in one forward of a few samples by path, in order of execution.

    Args:
        module: holds the layers; run in eval mode.
        layers: called with one tensor.
        run: how the module is called, and its batches.
        samples: how many.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    sources: dict[str, list[int]] = {}
    inputs_seen: list[Tensor] = []  # kept, so that no two inputs get the same address

    def record(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = inputs[0] if inputs else kwargs["input"]
            same = next((n for n, earlier in enumerate(inputs_seen) if earlier is values), len(inputs_seen))
            inputs_seen.append(values)
            shapes.setdefault(path, []).append(tuple(values.shape))
            sources.setdefault(path, []).append(same)

        return hook

    args, kwargs = forward_args(run.signature, repeat_to_size(run.statistics, samples), run.device)
    handles = [layer.register_forward_pre_hook(record(path), with_kwargs=True) for path, layer in layers.items()]
    with attached(handles), evaluation_mode(module), quiet_output():
        module(*args, **kwargs)
    return {
        path: LayerCalls(tuple(input_shapes), tuple(sources[path]), samples) for path, input_shapes in shapes.items()
    }


@contextlib.contextmanager
def quiet_output() -> Any:
    """Send prints of a model to the log and suppress warnings of libraries."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def error_location(error: BaseException) -> str:
    """Return the location and text of an error in the user's code: `net.py line 12: x.view(-1, 7200) (shape …)`."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if not _is_of_a_library(frame.filename):
            line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
            place = f"{Path(frame.filename).name} line {frame.lineno}: {line}"
    return f"{place} ({message})" if place else message


def _is_of_a_library(filename: str) -> bool:
    parts = Path(filename).parts
    folder = "site-packages" if "site-packages" in parts else "omgoptim" if "omgoptim" in parts else ""
    if not folder:
        return False
    inside = parts[len(parts) - parts[::-1].index(folder) :] if folder == "site-packages" else ("omgoptim",)
    return bool(inside) and inside[0] in LIBRARIES


def parameter_owners(module: nn.Module) -> dict[int, list[tuple[int, str]]]:
    """Return the owners (layer id and name) of each parameter by its id; more than one layer is a tie."""
    owners: dict[int, list[tuple[int, str]]] = {}
    for path, layer in module.named_modules():
        for name, tensor in layer._parameters.items():
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((id(layer), f"{path}.{name}" if path else name))
    return owners


def frozen_or_shared(layer: nn.Module, owners: Mapping[int, Sequence[tuple[int, str]]]) -> Refusal | None:
    """Return which parameter of a layer is frozen or shared with another layer; None if none is."""
    for name, tensor in layer._parameters.items():
        if tensor is not None and not tensor.requires_grad:
            return Refusal(f"{name} is frozen (requires_grad is False)", "excluded")
        if is_shared(tensor, owners):
            return Refusal(f"{name} is shared with another layer", "tied")
    return None


def is_shared(tensor: Tensor | None, owners: Mapping[int, Sequence[tuple[int, str]]]) -> bool:
    """Return whether several layers own a parameter; `owners` as `parameter_owners` gives them."""
    return len({owner for owner, _ in owners.get(id(tensor), [])}) > 1


def replacement_refusal(layer: nn.Linear | _ConvNd) -> Refusal | None:
    """Return why another layer in this one's place would not do what it does; None if it would."""
    if layer._parameters.get("weight") is None:
        return Refusal(f"its weight is computed from other parameters {FOLD}", "unsupported")
    torch_class = next(kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, _ConvNd) if isinstance(layer, kind))
    for name in ("forward", "_conv_forward"):
        if name in vars(layer) or getattr(type(layer), name, None) is not getattr(torch_class, name, None):
            return Refusal(f"{type(layer).__name__} overrides forward", "unsupported")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        reason = "it has hooks, which its replacement would not have"
        return Refusal(reason, "unsupported")
    return None


def tolerance_of(outputs: list[Tensor]) -> float:
    """Return the tolerance within which such outputs count as equal."""
    coarse = any(out.is_floating_point() and (out.element_size() < 4 or out.device.type != "cpu") for out in outputs)
    return COARSE_TOLERANCE if coarse else TOLERANCE


def relative_difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of any output, relative to its largest value; infinite where one is NaN.

    Raises:
        ValueError: their shapes differ.
    """
    largest = 0.0
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in expected]:
        raise ValueError("the outputs changed their shapes")
    for output, reference in zip(outputs, expected, strict=True):
        if output.numel():
            scale = max(float(reference.double().abs().max()), 1e-12)
            error = float((output.double() - reference.double()).abs().max()) / scale
            largest = max(largest, error if error == error else float("inf"))
    return largest


@contextlib.contextmanager
def torch_pruning_context() -> Iterator[None]:
    """Silence torch-pruning, and let it take a concatenation with an input whose width it does not know.

    For the states of a recurrent layer it adds None to the other widths, which raises; without an index mapping the
    concatenation is followed as it is, and what does not hold is found where a removal is tried.
    """
    with quiet_output():
        try:
            from torch_pruning.dependency import index_mapping
        except ImportError:  # not installed, which is said elsewhere
            yield
            return
        original = index_mapping.update_concat_index_mapping

        def update(graph: Any, node: Any) -> None:
            with contextlib.suppress(TypeError):
                original(graph, node)

        index_mapping.update_concat_index_mapping = update
        try:
            yield
        finally:
            index_mapping.update_concat_index_mapping = original


def call_torch_pruning(doing: str, call: Callable[[], Any]) -> Any:
    """Call torch-pruning without its warnings and prints.

    Raises:
        TechniqueError: it raised.
    """
    try:
        with torch_pruning_context():
            return call()
    except OmgoptimError:
        raise
    except Exception as error:  # torch-pruning raises whatever its heuristics run into
        fix = "use method magnitude, which prunes single weights"
        raise TechniqueError(f"{doing} failed", error_location(error), fix) from error


def _largest_axis(module: nn.Module, probe: Probe) -> int:
    """Return the most values of a sample's activation, or of an axis of a parameter."""
    sizes = [size for tensor in module.parameters() for size in tensor.shape]

    def record(_layer: nn.Module, _args: Any, output: Any) -> None:
        sizes.extend(leaf.numel() // probe.samples for leaf in tree_leaves(output) if isinstance(leaf, Tensor))

    with attached([layer.register_forward_hook(record) for layer in module.modules()]):
        probe.outputs(module)
    return max(sizes, default=1)


class WalkLimit:
    """Ends a walk in torch-pruning's graph with an error where it goes round in circles.

    Around an einsum it doubles the positions of an axis in every turn; in the decoding of boxes it never comes to an
    end.
    """

    def __init__(self, graph: Any, module: nn.Module, probe: Probe) -> None:
        """Take the graph, and the module that it is of."""
        dependencies = [dependency for node in graph.module2node.values() for dependency in node.dependencies]
        self._most_positions = MAX_GROWTH * _largest_axis(module, probe)
        self._most_steps = MAX_STEPS_PER_EDGE * len(dependencies)
        self.steps = 0
        """Steps of the walk so far: to be set to 0 before each."""
        for dependency in dependencies:
            dependency.index_mapping = [*dependency.index_mapping, self]

    def __call__(self, positions: list[Any]) -> list[Any]:
        """Return the positions of a step."""
        self.steps += 1
        if self.steps > self._most_steps or len(positions) > self._most_positions:
            raise ValueError("an operation between the layers mixes them")
        return positions
