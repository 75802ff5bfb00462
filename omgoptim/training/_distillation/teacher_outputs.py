"""Cache of the teacher's outputs: computed once for each sample, as they are the same in every epoch.

The keys are digests of the samples' inputs, so the data may come in any order. One pass with a seed of its own fills
the cache before the first epoch, in a resumed process too: its content does not depend on the state of the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omgoptim.training.batches import Batch, Batches
from omgoptim.training.config import TrainingConfig
from omgoptim.training.modes import seed_everything

if TYPE_CHECKING:
    from omgoptim.training._loop.training_state import Progress

LIMIT_BYTES = 512 * 2**20
"""Memory limit of the cache. Chosen: CIFAR's and GLUE's logits fit, ImageNet's 1.28 M of 1,000 classes do not."""

PASS = 1
"""Part of the seed of the caching passes: differs from every epoch of every round (rounds begin at 1)."""

EVERY = "computed for every batch"


class TeacherOutput(list[Tensor]):
    """The teacher's outputs for a batch, by position; empty where an output is not learned."""

    def to(self, device: str | torch.device) -> TeacherOutput:
        """Return the outputs on a device."""
        return TeacherOutput(tensor.to(device) for tensor in self)

    def has_rows(self, count: int) -> bool:
        """Return whether each learned output has one row for each of `count` samples."""
        return all(len(tensor) == count for tensor in self if tensor.numel())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


@dataclass(slots=True)
class TeacherOutputs:
    """The teacher's outputs for each sample, on the CPU."""

    size_bytes: int = 0
    _chunks: list[TeacherOutput] = field(default_factory=list)
    """As they were computed, a batch each."""
    _places: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """Digest of a sample to its chunk and row."""

    def __len__(self) -> int:
        return len(self._places)

    def holds(self, batch: Batch) -> bool:
        """Return whether all samples of a batch are cached."""
        return all(digest in self._places for digest in digests(batch))

    def of(self, batch: Batch) -> TeacherOutput | None:
        """Return the outputs for a batch, in its order; None unless all its samples are cached."""
        places = [self._places.get(digest) for digest in digests(batch)]
        known = [place for place in places if place is not None]
        if len(known) != len(places):
            return None
        found = TeacherOutput()
        for index, first in enumerate(self._chunks[0]):
            if not first.numel():
                found.append(first)
                continue
            rows = [self._chunks[chunk][index][row] for chunk, row in known]
            if len({row.shape for row in rows}) != 1:
                return None
            found.append(torch.stack(rows))
        return found

    def add(self, batch: Batch, outputs: TeacherOutput) -> None:
        """Cache the outputs for a batch; a sample that is cached already keeps its outputs."""
        for row, digest in enumerate(digests(batch)):
            self._places.setdefault(digest, (len(self._chunks), row))
        self._chunks.append(TeacherOutput(tensor.detach().cpu() for tensor in outputs))
        self.size_bytes += outputs.nbytes


def digests(batch: Batch) -> list[bytes]:
    """Return a digest of each sample's inputs: names, dtypes, shapes and bytes."""
    hashes = [blake2b(digest_size=16) for _ in range(batch.size)]
    for name, tensor in sorted(batch.inputs.items()):
        header = f"{name} {tensor.dtype} {tuple(tensor.shape[1:])} ".encode()
        rows = tensor.detach().cpu().contiguous().reshape(batch.size, tensor[0].numel()).view(torch.uint8).numpy()
        for made, row in zip(hashes, rows, strict=True):
            made.update(header)
            made.update(row.tobytes())
    return [made.digest() for made in hashes]


def cache_outputs(
    batches: Batches,
    config: TrainingConfig,
    count: int,
    first: Batch,
    compute: Callable[[Batch], TeacherOutput],
    progress: Progress = lambda _stage, _done: None,
) -> tuple[TeacherOutputs | None, str]:
    """Compute a teacher's outputs for all train samples if they are used more than once, and describe the decision.

    Args:
        batches: of the train split.
        config: number of epochs, batch size and seed.
        count: batches in an epoch.
        first: a batch of another pass over the data. Unless its samples come again, the inputs are augmented.
        compute: the teacher's outputs for a batch, which may be on the CPU.
        progress: `progress(stage, fraction)`.

    Returns:
        The outputs, or None where they cannot be kept, with the reason in the words beside.
    """
    if config.epochs < 2:
        return None, f"{EVERY}: there is only one epoch"
    example = compute(first)
    if not example.has_rows(first.size):
        return None, f"{EVERY}: they have no row per sample"
    if example.nbytes * count > LIMIT_BYTES:
        return None, f"{EVERY}: a cache would take {_size(example.nbytes * count)}"
    if _changing(batches, config, first):
        return None, f"{EVERY}: the inputs are augmented"
    cache, reported = TeacherOutputs(), 0.0
    seed_everything(config.seed, 0, PASS)
    for number, batch in enumerate(batches.epoch(config.batch), 1):
        if not cache.holds(batch):
            outputs = compute(batch)
            if not outputs.has_rows(batch.size):
                return None, f"{EVERY}: they have no row per sample"
            cache.add(batch, outputs)
        if cache.size_bytes > LIMIT_BYTES:
            return None, f"{EVERY}: a cache would take more than {_size(LIMIT_BYTES)}"
        if time.perf_counter() - reported > 1.0:
            reported = time.perf_counter()
            progress(f"training: computing the teacher's outputs, batch {number} of {count}", 0.0)
    return cache, f"computed once for {len(cache):,} samples and cached ({_size(cache.size_bytes)})"


def _changing(batches: Batches, config: TrainingConfig, first: Batch) -> bool:
    """Return whether samples of one pass are missing in another, up to one: a last batch of one sample is left out."""
    missing = set(digests(first))
    allowed = 1 if first.size > 2 else 0
    seed_everything(config.seed, 0, PASS)
    for batch in batches.epoch(config.batch):
        missing.difference_update(digests(batch))
        if not missing:
            return False
    return len(missing) > allowed


def _size(size_bytes: int) -> str:
    """Format a size in units of 1000 bytes, as reports do."""
    value = float(size_bytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
