"""Static int8 for ExecuTorch against its own documented recipe, and against our int8 on ONNX Runtime.

The recipe is that of the XNNPACK backend's page: `XNNPACKQuantizer` with the symmetric per-channel configuration, PT2E
calibration, `to_edge_transform_and_lower` with `XnnpackPartitioner`. All are saved as artifacts, reopened in fresh
processes, timed in turns, and judged on the evaluation data.

    python benchmarks/quantize_executorch.py [--models digits_cnn lite_net] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import bar, keep, machine, table
from torch import nn

from omgoptim.errors import OmgoptimError
from omgoptim.measure.launch import LATENCY
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.measure.quality import read_outputs
from omgoptim.measure.size import module_layers
from omgoptim.measure.timing import PLANS, Timing, time_artifacts
from omgoptim.models.artifact import save_program
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.pte_file import LAYERS
from omgoptim.models.samples import Samples
from omgoptim.requests.quantize import Static
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.quantize._executorch.lowering import LoweringInput, lower
from omgoptim.techniques.registry import ProgramRun, apply_to_program

HERE = Path(__file__).parent
THREADS = 2
CALIBRATION, EVALUATION = 128, 600
SPEED, POINTS_OF_RECIPE, POINTS_OF_ONNX = 0.95, 0.0, 0.005
"""Least speed over the recipe's; most accuracy lost against the recipe, and against ours on ONNX Runtime."""


def recipe(module: nn.Module, calibration: list[torch.Tensor], target: Path) -> None:
    """What ExecuTorch's documentation does."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    sample = (calibration[0].clone(),)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(module, sample).module(), quantizer)
    with torch.no_grad():
        for x in calibration:
            prepared(x)
    program = torch.export.export(convert_pt2e(prepared), sample)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    target.write_bytes(lowered.to_executorch().buffer)
    target.with_name(LAYERS).write_text("{}")


def tensors(dataset: Any, count: int) -> tuple[list[torch.Tensor], list[Any]]:
    """The first samples as batches of one, and their labels; None without labels."""
    items = [dataset[index] for index in range(min(count, len(dataset)))]
    return [item[0][None] for item in items], [int(item[1]) if len(item) > 1 else None for item in items]


def build(name: str, folder: Path) -> tuple[dict[str, Path], list[torch.Tensor], list[Any], Signature]:
    """The artifacts of one model by contestant, and the evaluation data."""
    source = importlib.import_module(name)
    module, calibration = source.build(), tensors(source.load("calibration"), CALIBRATION)[0]
    inputs, labels = tensors(source.load("eval"), EVALUATION)
    signature = Signature((InputTensor("input", "float32", (1, *inputs[0].shape[1:]), False),), "tensor")
    example = {"input": inputs[0].numpy()}
    run = ProgramRun([{"input": x.numpy()} for x in calibration], folder, 0, THREADS)
    layers = {layer.path: layer.op for layer in module_layers(module)}
    made: dict[str, tuple[Path, str, str]] = {}
    for contestant, params in (("float, ExecuTorch", None), ("omgoptim, ExecuTorch", Static())):
        target = folder / contestant.split(",")[0] / "model.pte"
        target.parent.mkdir()
        lower(LoweringInput(module, signature, example, run, layers), params, target)
        made[contestant] = (target, "executorch", "int8" if params else "float32")
    made["ExecuTorch's recipe"] = (folder / "recipe" / "model.pte", "executorch", "int8")
    made["ExecuTorch's recipe"][0].parent.mkdir()
    recipe(module, calibration, made["ExecuTorch's recipe"][0])
    free = signature.at_batch("batch")
    onnx, batches = (
        folder / "float.onnx",
        [{"input": torch.cat(calibration[i : i + 32]).numpy()} for i in range(0, len(calibration), 32)],
    )
    export_onnx(module, {"input": torch.cat(inputs[:2])}, free, onnx)
    made["omgoptim, ONNX Runtime"] = (folder / "int8.onnx", "onnxruntime", "int8")
    apply_to_program(onnx, folder / "int8.onnx", Static(algorithm="onnxruntime"), ProgramRun(batches, folder))
    saved = {}
    for contestant, (file, runtime, precision) in made.items():
        session = ENGINES[runtime].open(file, signature, SessionSettings(THREADS))
        check = OutputCheck(example, session.run(example))
        saved[contestant] = folder / f"artifact {len(saved)}"
        save_program(saved[contestant], file, Manifest(runtime, precision, signature), check)
    return saved, inputs, labels, signature


def compare(name: str, quick: bool, folder: Path) -> dict[str, Any]:
    """Time and judge the contestants on one model."""
    artifacts, inputs, labels, _ = build(name, folder)
    samples = Samples([{"input": x.numpy()} for x in inputs], labels)
    evaluation, latency = samples.write(folder / "eval"), folder / "latency.npz"
    np.savez(latency, input=inputs[0].numpy())
    setup = TimingSetup({LATENCY: latency}, 1, THREADS, folder)

    def outputs(index: int, process: MeasuringProcess) -> None:
        process.run_samples(evaluation, folder / "outputs" / str(index))

    timings = time_artifacts(
        list(artifacts.values()), setup, PLANS["quick" if quick else "standard"], 0, on_first=outputs
    )
    plain = scores(folder, 0)
    rows: dict[str, Any] = {}
    for index, (contestant, timing) in enumerate(zip(artifacts, timings, strict=True)):
        if isinstance(timing, OmgoptimError):
            raise timing
        rows[contestant] = row(timing, scores(folder, index), plain, labels, Manifest.read(artifacts[contestant]))
    columns = ("ms", "speedup", "quality", "KB")
    table(name, ("contestant", *columns), [(who, *(found[key] for key in columns)) for who, found in rows.items()])
    ours, theirs, onnx = (
        rows[who] for who in ("omgoptim, ExecuTorch", "ExecuTorch's recipe", "omgoptim, ONNX Runtime")
    )
    bars = [
        bar(f"{name}: speed over the recipe's", theirs["ms"] / ours["ms"], SPEED, at_least=True),
        bar(
            f"{name}: quality under the recipe's", theirs["quality"] - ours["quality"], POINTS_OF_RECIPE, at_least=False
        ),
        bar(f"{name}: quality under ONNX Runtime's", onnx["quality"] - ours["quality"], POINTS_OF_ONNX, at_least=False),
    ]
    return {"rows": rows, "bars": bars, "samples": len(inputs), "metric": "agreement" if labels[0] is None else "top1"}


def scores(folder: Path, index: int) -> NDArray[Any]:
    """Class scores of a contestant on the evaluation data, (N, classes)."""
    return np.concatenate([np.asarray(batch[0]) for batch in read_outputs(folder / "outputs" / str(index))])


def row(
    timing: Timing, got: NDArray[Any], plain: NDArray[Any], labels: list[Any], manifest: Manifest
) -> dict[str, Any]:
    """Numbers of one contestant; without labels its quality is agreement with the float model."""
    truth = plain.argmax(1) if labels[0] is None else np.array(labels)
    return {
        "ms": timing.latency_ms_p50,
        "speedup": timing.speedup.value if timing.speedup else 1.0,
        "quality": float((got.argmax(1) == truth).mean()),
        "KB": manifest.size_bytes / 1e3,
        "sqnr_db": -10 * float(np.log10(max(np.square(got - plain).sum() / np.square(plain).sum(), 1e-12))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits_cnn"], choices=["digits_cnn", "lite_net"])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    sys.path.append(str(HERE.parent / "examples"))
    torch.set_num_threads(THREADS)
    began, found = machine(), {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = compare(name, arguments.quick, Path(folder))
    keep("quantize_executorch", 0, arguments.quick, began, found)


if __name__ == "__main__":
    main()
