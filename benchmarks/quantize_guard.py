"""How many full evaluations does a guard take? `quantize` beside NNCF's accuracy control, on the same ONNX file.

The network is that of `hard_net.py`: depthwise convolutions whose channels are badly spread, which int8 with plain
ranges ruins. Both get the same 256 images to calibrate on, decide on the same 256 others, and the same guard. A full
evaluation is one pass of a candidate over all of those, the float model's and the plain int8 one's included. NNCF ranks
its layers by evaluations too, by default on as many images as calibrate, which are all of those; told to rank on 64, it
has full evaluations for its search alone. What all end with is saved and scored on images that none has seen, by ONNX
Runtime. `omgoptim, nncf` has NNCF's own quantizer under our search.

    python benchmarks/quantize_guard.py [--seed 0] [--guards 0.01 0.03] [--quick]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hard_net import SPREAD, export, load, outputs
from numpy.typing import NDArray
from record import bar, console, keep, machine, table

import omgoptim
from omgoptim.models.onnx_file import load as load_program
from omgoptim.models.onnx_graph import find_layers
from omgoptim.requests.quantize import Static

CALIBRATION, SELECTION = 256, 256
PLAIN = {"range_method": "minmax", "equalize": False, "bias_correction": False, "rounding": "nearest"}
"""Without what would repair the network before the guard has to."""

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """The images of one part, (N, 1, 28, 28), and their labels, (N,)."""

    images: Images
    labels: Labels

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs = zip(torch.from_numpy(self.images).split(32), torch.from_numpy(self.labels).split(32), strict=True)
        return list(pairs)


@dataclass(frozen=True, slots=True)
class Ended:
    """How one search ended."""

    full_evaluations: int
    other_evaluations: int
    """On one image or a few, to rank layers."""
    images_run: int
    layers_in_float: int
    selection_drop: float
    drop: float
    """On images that nobody has seen."""
    size_bytes: int
    seconds: float
    """Of the whole call."""
    search_seconds: float | None = None
    """Of our search: ranking, building and evaluating, without the plain candidate; NNCF does not say its own."""


def splits() -> tuple[Split, Split, Split]:
    """Calibration, selection and the rest: the second is the head of hard_net's evaluation images."""
    first, rest = (load(name).tensors for name in ("calibration", "eval"))
    cut = SELECTION + (len(rest[0]) - SELECTION) % 32
    parts = ((first[0][:CALIBRATION], first[1][:CALIBRATION]), (rest[0][:SELECTION], rest[1][:SELECTION]))
    return tuple(Split(x.numpy(), y.numpy()) for x, y in (*parts, (rest[0][cut:], rest[1][cut:])))  # type: ignore[return-value]


def accuracy(program: Path, split: Split) -> float:
    return float((outputs(program, split.images).argmax(1) == split.labels).mean())


def nncf_accuracy_control(
    source: Path, target: Path, guard: float, data: tuple[Split, Split, Split], ranked_on: int | None = None
) -> Ended:
    """NNCF's own search, which is given accuracy and each image's score, so that it need not ask for outputs."""
    import nncf
    import onnx
    import onnxruntime

    calibration, selection, _ = data
    calls: list[int] = []

    def validate(model: Any, items: Iterable[tuple[Images, int]]) -> tuple[float, list[float]]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        scores = [float(session.run(None, {"x": image})[0].argmax() == label) for image, label in items]
        calls.append(len(scores))
        return float(np.mean(scores)), scores

    items = list(zip(np.split(selection.images, SELECTION), selection.labels.tolist(), strict=True))
    began = time.perf_counter()
    made = nncf.quantize_with_accuracy_control(
        onnx.load(str(source)),
        nncf.Dataset(np.split(calibration.images, CALIBRATION), lambda image: {"x": image}),
        nncf.Dataset(items, lambda item: {"x": item[0]}),
        validate,
        max_drop=guard,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=CALIBRATION,
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(ranking_subset_size=ranked_on),
    )
    seconds = time.perf_counter() - began
    onnx.save(made, str(target))
    full = sum(size == SELECTION for size in calls)
    return ended(full, len(calls) - full, sum(calls), source, target, data, seconds)


def ours(source: Path, target: Path, guard: float, data: tuple[Split, Split, Split], algorithm: str) -> Ended:
    """`quantize` with the guard, its plain candidate as plain as NNCF's."""
    calibration, selection, rest = data
    began = time.perf_counter()
    report = omgoptim.quantize(
        str(source),
        data={"calibration": [*calibration.batches(), *selection.batches()], "eval": rest.batches()},
        scheme=Static(algorithm=algorithm, **PLAIN),  # type: ignore[arg-type]
        runtime="onnxruntime",
        max_quality_drop=guard,
        samples=len(rest.labels),
        timing="quick",
    )
    seconds = time.perf_counter() - began
    if report.artifact is None:
        raise SystemExit("the run left no artifact")
    target.write_bytes(Path(report.artifact.path, "model.onnx").read_bytes())
    full = 2 + (report.guard.evaluations if report.guard else 0)  # the float model and the plain candidate are screened
    done = ended(full, 0, SELECTION * full, source, target, data, seconds)
    return replace(done, search_seconds=report.guard.seconds if report.guard else 0.0)


def ended(
    full: int, other: int, images: int, source: Path, target: Path, data: tuple[Split, Split, Split], seconds: float
) -> Ended:
    """What a search took, and what its file gives."""
    in_float = sum(not layer.is_quantized for layer in find_layers(load_program(target)))
    selection, rest = (accuracy(source, part) - accuracy(target, part) for part in data[1:])
    return Ended(full, other, images, in_float, selection, rest, target.stat().st_size, seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guards", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--quick", action="store_true", help="one guard; proves nothing")
    options = parser.parse_args()
    os.environ |= {"NNCF_CI": "1", "CI": "true"}  # no telemetry
    began, data = machine(), splits()
    results: dict[str, dict[str, Any]] = {}
    bars = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as project:
        source = Path(project) / "float.onnx"
        os.environ["OMGOPTIM_PROJECT"] = project
        export(source, options.seed, SPREAD)
        before = {"selection": accuracy(source, data[1]), "rest": accuracy(source, data[2])}
        for guard in options.guards[:1] if options.quick else options.guards:
            peers = {
                "NNCF accuracy control": nncf_accuracy_control(source, Path(folder) / "peer.onnx", guard, data),
                "NNCF, ranking on 64": nncf_accuracy_control(source, Path(folder) / "peer64.onnx", guard, data, 64),
            }
            own = {
                "omgoptim, nncf": ours(source, Path(folder) / "nncf.onnx", guard, data, "nncf"),
                "omgoptim, onnxruntime": ours(source, Path(folder) / "ort.onnx", guard, data, "onnxruntime"),
            }
            everyone = peers | own
            results[f"{guard:g}"] = {name: asdict(end) for name, end in everyone.items()}
            columns = (
                "full_evaluations",
                "other_evaluations",
                "layers_in_float",
                "selection_drop",
                "drop",
                "size_bytes",
            )
            times = ("seconds", "search_seconds")
            rows = [(name, *(asdict(end)[column] for column in (*columns, *times))) for name, end in everyone.items()]
            table(f"guard {guard:g} on {SELECTION} images", ("", *columns, *times), rows)
            fewest = min(peer.full_evaluations for peer in peers.values())
            fastest = min(peer.seconds for peer in peers.values())
            for name, end in own.items():
                what = f"{name}, guard {guard:g}"
                ratio = end.full_evaluations / fewest
                bars += [
                    bar(f"{what}: full evaluations over NNCF's fewest", ratio, 0.99, at_least=False),
                    bar(f"{what}: drop on the selection images", end.selection_drop, guard, at_least=False),
                    bar(
                        f"{what}: its search / NNCF's fastest call",
                        (end.search_seconds or 0) / fastest,
                        1,
                        at_least=False,
                    ),
                ]
    console.print(f"float accuracy {before}")
    keep("quantize_guard", options.seed, options.quick, began, {"float": before, "guards": results, "bars": bars})


if __name__ == "__main__":
    main()
