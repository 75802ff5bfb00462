"""Selection of the weights for unstructured pruning, and a weight as a matrix with one row per output.

Selected are weights of linear, convolution and recurrent layers, of the projections of nn.MultiheadAttention, and of
embeddings that are named; blocks of ours are made of these. Biases and normalization never: they are few, and each
scales a whole unit.

A row of the matrix holds what one output (a unit, a channel, a gate of a recurrent unit) reads. Its columns run over
the kernel's positions, and at each over the input channels, so that neighbours in a row are neighbouring input channels
at the same position: the order in which n:m kernels want their groups (as NVIDIA's ASP permutes convolutions).

    Linear            (O, I)              ->  (O, I)
    Conv, g groups    (O, I/g, *k)        ->  (O, *k * I/g)
    ConvTranspose     (I, O/g, *k)        ->  (O, *k * I/g)
    Conv1D of GPT-2   (I, O)              ->  (O, I)
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from omgoptim.errors import TechniqueError
from omgoptim.models.globs import is_selected, refuse_unknown
from omgoptim.reports import Skip
from omgoptim.techniques.registry import Refusal

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NO_WEIGHTS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, ParametrizationList)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

EMBEDDING_REASON = "embeddings are pruned only if targets names them"
FROZEN_REASON = "it is frozen (requires_grad is False)"


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight, listed once however many layers share it."""

    path: str
    """The layer's path, or the parameter's where the layer has several weights or is the model itself."""
    parameter: nn.Parameter
    layer: nn.Module
    shared: tuple[tuple[str, nn.Module], ...] = ()
    """The other layers that it belongs to, with their paths."""

    @property
    def count(self) -> int:
        return self.parameter.numel()

    @property
    def layers(self) -> list[nn.Module]:
        return [self.layer, *(layer for _, layer in self.shared)]

    @property
    def paths(self) -> list[str]:
        return [self.path, *(path for path, _ in self.shared)]


@dataclass(frozen=True, slots=True)
class Selection:
    """The weights to take zeros from, and the layers left alone with the reason."""

    weights: list[Weight]
    skipped: list[Skip] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(weight.count for weight in self.weights)

    @property
    def zeros(self) -> int:
        """Return how many weights are zero now."""
        return sum(int((weight.parameter.detach() == 0).sum()) for weight in self.weights)

    def only(self, paths: Collection[str], reason: str) -> Selection:
        """Return the weights at these paths; the others are skipped for a reason of kind `not_run`."""
        others = [Skip(path=w.path, reason=reason, kind="not_run") for w in self.weights if w.path not in paths]
        return Selection([w for w in self.weights if w.path in paths], [*self.skipped, *others])


def select(module: nn.Module, targets: Sequence[str], ignore: Sequence[str]) -> Selection:
    """Select the weights that `targets` names (all, if empty) less those that `ignore` names.

    A glob names a layer by its path, or by the path of a module around it: `encoder` is all of the encoder. A weight
    that several layers share is meant where any of them is.

    Raises:
        TechniqueError: a glob names no layer, or no weight is left.
    """
    found, skipped = _find_weights(module)
    known = [path for weight in found for path in weight.paths] + [skip.path for skip in skipped]
    refuse_unknown((*targets, *ignore), known)
    skipped = [skip for skip in skipped if is_selected([skip.path], targets, ignore)]
    weights = []
    for weight in (weight for weight in found if is_selected(weight.paths, targets, ignore)):
        if refusal := _refusal(weight, targets):
            skipped.append(refusal.skip(weight.path))
        else:
            weights.append(weight)
    if not weights:
        reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in skipped[:5])
        raise TechniqueError(
            "there is no weight to prune",
            reasons or "no Linear, convolution or recurrent layer was found (a .pt2 program has no such modules)",
            "select other layers with targets" if targets or ignore else "give a module that has such layers",
        )
    return Selection(weights, skipped)


def _refusal(weight: Weight, targets: Sequence[str]) -> Refusal | None:
    """Return why a selected weight is skipped, or None."""
    parameter = weight.parameter
    embeddings = [
        path for path, layer in zip(weight.paths, weight.layers, strict=True) if isinstance(layer, EMBEDDINGS)
    ]
    if not parameter.is_floating_point():
        return Refusal(f"its weight is {str(parameter.dtype).removeprefix('torch.')}, not float", "unsupported")
    if not parameter.requires_grad:
        return Refusal(FROZEN_REASON, "excluded")
    unnamed = [path for path in embeddings if not any(_names_layer(glob, path) for glob in targets)]
    if unnamed:
        shared = f"it shares its weight with {unnamed[0]}; " if unnamed[0] != weight.path or weight.shared else ""
        return Refusal(shared + EMBEDDING_REASON, "excluded")
    if not bool(torch.isfinite(parameter).all()):
        return Refusal("its weight contains NaN or infinity", "unsupported")
    return None


def _find_weights(module: nn.Module) -> tuple[list[Weight], list[Skip]]:
    """Return every weight, and every layer or parameter that looks like one and cannot be pruned."""
    owners: dict[tuple[int, int], list[tuple[str, nn.Module, nn.Parameter]]] = {}
    skipped: list[Skip] = []
    strange: list[tuple[str, nn.Module, nn.Parameter]] = []
    for path, layer in module.named_modules(remove_duplicate=False):
        names = _weight_names(layer)
        for name in names:
            parameter = layer._parameters.get(name)
            label = path if path and names == ["weight"] else _join(path, name)
            if parameter is None:
                reason = f"its {name} is computed from other parameters; remove the parametrization first"
                skipped.append(Skip(path=label, reason=reason, kind="unsupported"))
            elif parameter.numel():
                owners.setdefault(_storage_key(parameter), []).append((label, layer, parameter))
        if not names and not isinstance(layer, NO_WEIGHTS):
            parameters = layer.named_parameters(recurse=False)
            strange += [(_join(path, name), layer, parameter) for name, parameter in parameters if parameter.ndim > 1]
    for label, layer, parameter in strange:
        if _storage_key(parameter) not in owners:
            reason = f"{type(layer).__name__} is not a supported layer type"
            skipped.append(Skip(path=label, reason=reason, kind="unsupported"))
    weights = [
        Weight(label, parameter, layer, tuple((path, other) for path, other, _ in others))
        for (label, layer, parameter), *others in owners.values()
    ]
    return weights, skipped


def _storage_key(parameter: nn.Parameter) -> tuple[int, int]:
    """Return a key that is the same for a weight under two names, even where the parameter objects differ."""
    return parameter.data_ptr(), parameter.numel()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _weight_names(layer: nn.Module) -> list[str]:
    """Return the attributes of a known layer that are weights."""
    if isinstance(layer, (nn.Linear, _ConvNd, *EMBEDDINGS)) or is_linear_transposed(layer):
        return ["weight"]
    if isinstance(layer, nn.RNNBase):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    if isinstance(layer, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if isinstance(layer, nn.MultiheadAttention):
        return [name for name in PROJECTIONS if layer._parameters.get(name) is not None]
    return []


def _names_layer(glob: str, path: str) -> bool:
    """Return whether a glob names this layer specifically, not only by matching everything."""
    return fnmatch.fnmatchcase(path, glob) and glob.strip("*?.") != ""


def is_linear_transposed(layer: nn.Module) -> bool:
    """Return whether a layer is Hugging Face's Conv1D: a Linear that stores its weight as (inputs, outputs)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def to_rows(tensor: Tensor, layer: nn.Module) -> Tensor:
    """Return a tensor of the weight's shape as (outputs, inputs that each reads)."""
    if is_linear_transposed(layer):
        return tensor.T
    if isinstance(layer, _ConvTransposeNd):
        inputs, outputs = tensor.shape[0] // layer.groups, tensor.shape[1]
        grouped = tensor.reshape(layer.groups, inputs, outputs, -1)  # (g, I/g, O/g, K)
        return grouped.permute(0, 2, 3, 1).reshape(layer.groups * outputs, -1)
    if isinstance(layer, _ConvNd):
        return tensor.flatten(2).transpose(1, 2).reshape(tensor.shape[0], -1)
    return tensor


def from_rows(rows: Tensor, layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return (outputs, inputs) in the shape of the layer's weight: the inverse of `to_rows`."""
    if is_linear_transposed(layer):
        return rows.T
    if isinstance(layer, _ConvTransposeNd):
        inputs, outputs, kernel = shape[0] // layer.groups, shape[1], math.prod(shape[2:])
        grouped = rows.reshape(layer.groups, outputs, kernel, inputs)
        return grouped.permute(0, 3, 1, 2).reshape(shape)
    if isinstance(layer, _ConvNd):
        return rows.reshape(shape[0], math.prod(shape[2:]), shape[1]).transpose(1, 2).reshape(shape)
    return rows


def channels_in(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the input channels that one output reads: the length of the runs in a row that n:m groups lie in."""
    if isinstance(layer, _ConvTransposeNd):
        return shape[0] // layer.groups
    return shape[0] if is_linear_transposed(layer) else shape[1]
