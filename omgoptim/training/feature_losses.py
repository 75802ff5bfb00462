"""Feature distillation: losses between layers of student and teacher, beside or instead of their outputs.

fitnets     match the teacher's layer outputs through a linear adapter: arXiv:1412.6550.
attention   match the spatial attention maps of layers: arXiv:1612.03928.
relational  match distances and angles between samples: arXiv:1904.05068.
minilm      match the query, key and value relations of the last self-attention: arXiv:2012.15828.
Distances and their scales: `_distillation/distances.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from omgoptim.errors import DataError, RequestError, did_you_mean
from omgoptim.training._distillation.distances import (
    attention_distance,
    hint_distance,
    relation_divergence,
    relation_heads,
    relational_distance,
)
from omgoptim.training._distillation.layer_pairing import attention_of, pairs_of, requested_pair, split_pair
from omgoptim.training.layer_trace import LayerOutput, Side, Trace, capture_outputs

Method = Literal["fitnets", "attention", "relational", "minilm"]

WORDS: dict[Method, str] = {
    "fitnets": "hints (FitNets)",
    "attention": "attention maps",
    "relational": "relations between samples (RKD)",
    "minilm": "attention relations (MiniLM)",
}


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Place in a module whose tensor is captured."""

    path: str
    side: Side
    axis: int = -1
    """Axis of the channels."""

    @staticmethod
    def of(layer: LayerOutput) -> LayerPlace:
        """Return the place of a layer's output."""
        return LayerPlace(layer.path, "output", layer.axis)

    def __str__(self) -> str:
        return f"{'the input of ' if self.side == 'input' else ''}{self.path or 'the output'}"


@dataclass(frozen=True, slots=True)
class Features:
    """Captured features of student and teacher for one batch, by path and side."""

    student: Mapping[tuple[str, Side], Tensor]
    teacher: Mapping[tuple[str, Side], Tensor]


class FeatureLoss(nn.Module):
    """Feature-distillation loss: distance between paired layers, averaged over pairs (for minilm summed).

    Its only parameters are the adapters of fitnets: a linear map of channels (a 1x1 convolution of maps) for each pair
    whose widths differ. They are trained with the student, and are no part of it. The bigger of two grids is averaged
    to the size of the smaller; padded tokens (`attention_mask`) are left out.

    Args:
        weight: of the distance beside the other losses.
        pairs: places in the student and in the teacher.
        widths: channels there, of the student and of the teacher: for fitnets only, one for each pair.
        seed: that the adapters are drawn from; the global random state is not touched.

    Example:
        >>> import torch, omgoptim
        >>> from omgoptim.training.feature_losses import LayerPlace
        >>> student, teacher = (torch.nn.Sequential(torch.nn.Linear(4, n), torch.nn.Linear(n, 2)) for n in (8, 16))
        >>> hidden = LayerPlace("0", "output")
        >>> loss = omgoptim.FeatureLoss("fitnets", weight=1.0, pairs=[(hidden, hidden)], widths=[(8, 16)])
        >>> x = torch.randn(3, 4)
        >>> with loss.capturing(student, teacher) as features:
        ...     _ = student(x), teacher(x)
        >>> loss(features).shape
        torch.Size([])
    """

    def __init__(
        self,
        method: Method,
        weight: float,
        pairs: Sequence[tuple[LayerPlace, LayerPlace]],
        widths: Sequence[tuple[int, int]] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of features must be above 0, not {weight:g}")
        self.method, self.weight, self.pairs = method, weight, list(pairs)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.adapters = nn.ModuleList(
                nn.Identity() if own == theirs else nn.Linear(own, theirs) for own, theirs in widths
            )

    @staticmethod
    def of(
        method: str, weight: float, pairs: Sequence[str], student: Trace, teacher: Trace, seed: int = 0
    ) -> FeatureLoss:
        """Create the loss between the layers of two modules.

        Args:
            method: fitnets, attention, relational or minilm.
            weight: factor of this loss beside that of the outputs.
            pairs: `STUDENT=TEACHER` by module path, or one path for both; empty: found by path and shape. For minilm
                the module around queries, keys and values; for relational any layer, its positions averaged, instead
                of the input of the last Linear (or, where that is not what answers, the output).
            student: its layers and their outputs for a batch.
            teacher: its layers, for the same batch.
            seed: of the adapters between layers of different width.

        Raises:
            RequestError: the method is unknown; a pair's layer does not exist, or gives nothing to compare.
            TechniqueError: no layers can be paired, or attentions are of a kind that minilm cannot read.
        """
        if method not in get_args(Method):
            raise RequestError(f"features '{method}' are unknown", did_you_mean(method, get_args(Method)))
        checked: Method = method  # type: ignore[assignment]
        if checked == "relational" and not pairs:
            return FeatureLoss(checked, weight, [(_embedding(student), _embedding(teacher))])
        if checked == "minilm":
            layers = _attention_pairs(student, teacher, pairs)
        elif checked == "relational":
            layers = [requested_pair(text, student, teacher) for text in pairs]
        else:
            layers = pairs_of(student, teacher, pairs, positions=checked == "attention")
        widths = [(first.channels, second.channels) for first, second in layers] if checked == "fitnets" else []
        return FeatureLoss(
            checked, weight, [(LayerPlace.of(first), LayerPlace.of(second)) for first, second in layers], widths, seed
        )

    @property
    def name(self) -> str:
        """Description for the report."""
        return WORDS[self.method]

    @property
    def names(self) -> list[str]:
        """Describe the pairs for the report."""
        names = []
        for student, teacher in self.pairs:
            words = f"{student} of both" if str(student) == str(teacher) else f"{student} after the teacher's {teacher}"
            names.append(words)
        for index, adapter in enumerate(self.adapters):
            if isinstance(adapter, nn.Linear):
                names[index] += f", through an adapter {adapter.in_features} to {adapter.out_features}"
        return names

    @contextmanager
    def capturing(self, student: nn.Module, teacher: nn.Module) -> Iterator[Features]:
        """Capture both modules' features in their last forward within the block; the hooks are removed afterwards."""
        with (
            capture_outputs(
                student, [(student_place.path, student_place.side) for student_place, _ in self.pairs]
            ) as student_features,
            capture_outputs(
                teacher, [(teacher_place.path, teacher_place.side) for _, teacher_place in self.pairs]
            ) as teacher_features,
        ):
            yield Features(student_features, teacher_features)

    def forward(self, captured: Features, real: Tensor | None = None) -> Tensor:
        """Return the distance, without its weight: a scalar with the gradient of the student's features.

        Args:
            captured: values of the paired layers in one forward of each module.
            real: (batch, length), nonzero where a token is not padding.

        Raises:
            DataError: a layer was not called, or its values cannot be compared.
        """
        distances = [self._distance(index, captured, real) for index in range(len(self.pairs))]
        total = torch.stack(distances).sum()
        return total if self.method == "minilm" else total / len(distances)

    def _distance(self, index: int, captured: Features, real: Tensor | None) -> Tensor:
        student_place, teacher_place = self.pairs[index]
        student = _values(captured.student, student_place, "student")
        teacher = _values(captured.teacher, teacher_place, "teacher").detach()
        if self.method == "relational":
            return relational_distance(_pooled(student, real), _pooled(teacher, real))
        if self.method == "minilm":
            heads = relation_heads(student.shape[-1], teacher.shape[-1])
            return relation_divergence(student, teacher, heads, _of_tokens(student, real))
        if self.method == "attention":
            student, teacher = (x.square().mean(-1, keepdim=True) for x in (student, teacher))
        grid = [min(sizes) for sizes in zip(student.shape[1:-1], teacher.shape[1:-1], strict=True)]
        student, teacher = _averaged(student, grid), _averaged(teacher, grid)
        tokens = _of_tokens(student, real)
        if self.method == "attention":
            return attention_distance(student.flatten(1), teacher.flatten(1), tokens)
        return hint_distance(self.adapters[index](student), teacher, tokens)


def _embedding(traced: Trace) -> LayerPlace:
    """Return the input of the head (the Linear layer that gives the main output); without one, the main output."""
    return LayerPlace("", "output") if traced.head is None else LayerPlace(traced.head, "input")


def _attention_pairs(student: Trace, teacher: Trace, requested: Sequence[str]) -> list[tuple[LayerOutput, LayerOutput]]:
    """Pair queries, keys and values of the last self-attentions, or of the requested ones."""
    paths: list[tuple[str | None, str | None]] = [split_pair(text) for text in requested] or [(None, None)]
    pairs: list[tuple[LayerOutput, LayerOutput]] = []
    for student_path, teacher_path in paths:
        pairs += zip(
            attention_of(student, student_path, "student"), attention_of(teacher, teacher_path, "teacher"), strict=True
        )
    return pairs


def _values(captured: Mapping[tuple[str, Side], Tensor], place: LayerPlace, whose: str) -> Tensor:
    """Return the features captured at a place, in float32, channels last."""
    found = captured.get((place.path, place.side))
    if found is None:
        raise DataError(
            f"layer '{place.path}' of the {whose} was not called",
            "feature distillation needs its activations for every batch",
            "name another layer: feature_layers STUDENT=TEACHER",
        )
    return found.float().movedim(place.axis, -1)


def _pooled(values: Tensor, real: Tensor | None) -> Tensor:
    """Return values (batch, …, D) averaged over their positions without padding: (batch, D)."""
    tokens = _of_tokens(values, real)
    if tokens is not None:
        real_tokens = (tokens != 0).unsqueeze(-1)
        return (values * real_tokens).sum(1) / real_tokens.sum(1).clamp(min=1)
    return values if values.ndim == 2 else values.flatten(1, -2).mean(1)


def _of_tokens(values: Tensor, real: Tensor | None) -> Tensor | None:
    """Return `real` if it has the positions of these values (batch, length, D)."""
    return real if real is not None and values.ndim == 3 and real.shape == values.shape[:2] else None


def _averaged(values: Tensor, grid: list[int]) -> Tensor:
    """Return values (batch, *positions, D) averaged to a smaller grid of positions."""
    if list(values.shape[1:-1]) == grid:
        return values
    pools = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    averaged: Tensor = pools[len(grid) - 1](tuple(grid))(values.movedim(-1, 1))
    return averaged.movedim(1, -1)
