"""Recorded outputs of an artifact: a small batch, and the model's outputs for it before it was saved. No torch."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import ArtifactError
from omgoptim.runtimes import Session

if TYPE_CHECKING:
    from omgoptim.models.manifest import Manifest

CHECK = "check.npz"
"""File name of the recorded batch and outputs."""

TOLERANCE = {
    "float64": 1e-3,
    "float32": 1e-3,
    "float16": 1e-2,
    "bfloat16": 1e-2,
    "int8": 1e-2,
    "int4": 1e-2,
    "int8_dynamic": 1e-2,
}
"""Largest accepted difference from the recorded outputs, relative to their scale, by precision. Chosen: above the
rounding that adds up over layers (one of float16 is 5e-4), below the effect of a wrong weight."""


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """A small batch, and the model's outputs for it in the process that saves the model."""

    batch: Mapping[str, NDArray[Any]]
    outputs: list[NDArray[Any]]


def write_check(folder: Path, check: OutputCheck) -> None:
    """Write `check.npz` into an artifact's folder."""
    arrays = {f"in:{name}": array for name, array in check.batch.items()}
    arrays |= {f"out:{index}": array for index, array in enumerate(check.outputs)}
    np.savez(folder / CHECK, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for options


def read_check(folder: Path) -> OutputCheck:
    """Read `check.npz` of an artifact's folder.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        with (folder / CHECK).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            batch = {name[3:]: file[name] for name in file.files if name.startswith("in:")}
            outputs = [file[f"out:{index}"] for index in range(sum(name.startswith("out:") for name in file.files))]
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ArtifactError(
            f"artifact {folder} is damaged",
            f"{CHECK} cannot be read: {error}",
            "run the compression again, or restore the file",
        ) from error
    return OutputCheck(batch, outputs)


def verify_outputs(folder: Path, manifest: Manifest, session: Session, *, same_machine: bool = True) -> list[float]:
    """Run the recorded batch and compare with the recorded outputs.

    Args:
        folder: folder of the artifact.
        manifest: its manifest.
        session: the opened artifact.
        same_machine: the outputs were recorded with the kernels of this machine; those of another round differently.

    Returns:
        The largest difference of each output, relative to its own scale.

    Raises:
        ArtifactError: the recorded batch is damaged, NaN, or a difference above `TOLERANCE`.
    """
    check = read_check(folder)
    checked = session.run(check.batch)
    worst = max_difference(check.outputs, checked)
    if not worst <= (TOLERANCE[manifest.precision] if same_machine else sys.float_info.max):
        raise ArtifactError(
            f"artifact {folder} does not reproduce its recorded outputs",
            f"they differ by {worst:.3g} relative to their scale; the tolerance is {TOLERANCE[manifest.precision]:g}",
            "the engine or its version may have changed: run the compression again with this Python",
        )
    return [max_difference([one], [other]) for one, other in zip(check.outputs, checked, strict=True)]


def max_difference(expected: list[NDArray[Any]], actual: list[NDArray[Any]]) -> float:
    """Return the largest absolute difference over all outputs, relative to each expected output's largest value.

    NaN if any difference is NaN.
    """
    if len(expected) != len(actual) or any(a.shape != b.shape for a, b in zip(expected, actual, strict=True)):
        return float("inf")
    worst = 0.0
    for one, other in zip(expected, actual, strict=True):
        if one.size:
            a, b = one.astype(np.float64), other.astype(np.float64)
            with np.errstate(invalid="ignore"):  # inf - inf, where both are: no difference
                difference = float(np.where(np.isinf(a) & (a == b), 0.0, np.abs(a - b)).max())
            if np.isnan(difference):
                return float("nan")
            finite = np.abs(a[np.isfinite(a)])
            worst = max(worst, difference / max(float(finite.max(initial=0.0)), 1e-6))
    return worst
