"""Cache of the PTQ pipeline's result, for a later program with more layers in float.

Mixed precision writes many programs that differ only in their layers in float. Equalization, ranges, bias correction
and rounding are taken from the program with all layers quantized: the layers in float get their weights back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from omgoptim.models.onnx_file import load, save
from omgoptim.techniques.quantize._onnx.qdq import Range
from omgoptim.techniques.quantize._ptq.state import PtqTask


@dataclass(frozen=True, slots=True)
class PtqResult:
    """The float program to write in QDQ form, after all steps."""

    model: ModelProto
    reference: ModelProto
    """The program before any rounding and bias correction."""
    ranges: Mapping[str, Range]
    quantized: Sequence[str]
    """Nodes of the layers to quantize."""
    left_out: Sequence[str]
    """Nodes of the task's layers that the pipeline keeps in float."""
    notes: Sequence[str]
    """Sentences on the steps taken."""


def cache_result(result: PtqResult, task: PtqTask) -> None:
    """Write the result to the cache folder of the task, if there is one and the disk has the space."""
    if task.cache is None:
        return
    program, reference, rest = _files(task.cache, task)
    ranges = {name: [float(low), float(high)] for name, (low, high) in result.ranges.items()}
    lists = {"quantized": [*result.quantized], "left_out": [*result.left_out], "notes": [*result.notes]}
    with suppress(OSError):
        task.cache.mkdir(parents=True, exist_ok=True)
        save(result.model, program)
        save(result.reference, reference)
        rest.write_text(json.dumps(lists | {"ranges": ranges}), encoding="utf-8")  # last: with it the result is whole


def cached_result(task: PtqTask) -> PtqResult | None:
    """Return the cached result of the same params with these or more layers; None where there is none."""
    if task.cache is None:
        return None
    program, reference, rest = _files(task.cache, task)
    if not rest.exists():
        return None
    lists = json.loads(rest.read_text(encoding="utf-8"))
    if not {layer.node for layer in task.chosen} <= {*lists["quantized"], *lists["left_out"]}:
        return None
    ranges = {name: (low, high) for name, (low, high) in lists.pop("ranges").items()}
    return PtqResult(load(program), load(reference), ranges, **lists)


def _files(folder: Path, task: PtqTask) -> list[Path]:
    """Return the files of the program, of the reference and of the rest; one name for all values of `ignore`."""
    text = task.params.model_copy(update={"ignore": []}).model_dump_json()
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return [folder / f"{key}.{kind}" for kind in ("program.onnx", "reference.onnx", "json")]
