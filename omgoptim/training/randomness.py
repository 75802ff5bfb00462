"""Global random state: seeded for each epoch, restored afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*parts: int) -> None:
    """Seed torch, numpy and random from a few non-negative numbers: augmentation and dropout draw from all three."""
    words = np.random.SeedSequence(parts).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


@contextmanager
def own_randomness() -> Iterator[None]:
    """Restore the global random states at the end of the block."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
