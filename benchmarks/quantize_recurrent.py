"""Recurrent layers in int8 and Linear layers in 4 bits: bytes, closeness and time, against ONNX Runtime's own.

lstm    three LSTM layers of 256 units on 160 frames of 40 (Resemblyzer's speaker encoder with its own weights where
        that package is installed, else weights drawn from the seed), against `quantize_dynamic` as it is by default
gru     two GRU layers of 128 units, trained on seglearn's watch recordings, scored on other people; against float,
        since `quantize_dynamic` leaves a GRU as it is
minilm  MiniLM's Linear layers in groups of 64, on sentences that it was not rounded with; against float

python benchmarks/quantize_recurrent.py [--parts lstm gru minilm] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from distill_data import located, watch
from distill_nets import taught
from numpy.typing import NDArray
from record import bar, console, keep, machine, table
from safetensors.torch import load_file
from torch import Tensor, nn

from omgoptim.errors import OmgoptimError
from omgoptim.hardware import usable_cores
from omgoptim.measure.launch import LATENCY, THROUGHPUT
from omgoptim.measure.measuring_process import TimingSetup
from omgoptim.measure.timing import PLANS, time_artifacts
from omgoptim.models import artifact as artifacts
from omgoptim.models.manifest import PROGRAM, Manifest
from omgoptim.models.onnx_file import load, tensor_bytes
from omgoptim.models.output_check import OutputCheck
from omgoptim.requests import Params
from omgoptim.requests.quantize import Dynamic, WeightOnly
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.quantize._onnx.preparation import fold_constants
from omgoptim.techniques.registry import ProgramRun, apply_to_program

EXAMPLES = Path(__file__).parent.parent / "examples"
CACHE = Path(__file__).parent.parent / "build" / "quantize-recurrent"
EPOCHS, LEARNING_RATE = 6, 3e-3

SPREAD = 3
"""Of drawn LSTM weights, in PyTorch's own: with those as they are, every input gives about the same embedding."""

FLOAT, OURS, PEER = "ONNX Runtime float32", "omgoptim", "ONNX Runtime quantize_dynamic"

Arrays = dict[str, NDArray[Any]]


class Speaker(nn.Module):
    """Frames (N, 160, 40) to an embedding (N, 256) of length 1: the layers of Resemblyzer's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


class DeepReader(nn.Module):
    """Windows (N, 50, 6) to scores of 7 exercises."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 7)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.gru(x)[0].mean(1))
        return scores


@dataclass(frozen=True, slots=True)
class Contest:
    """A float program, what judges it, and the programs made of it by name."""

    name: str
    programs: Mapping[str, Path]
    signature: Signature
    inputs: Arrays
    folder: Path

    def outputs(self, name: str) -> NDArray[Any]:
        settings = SessionSettings(usable_cores())
        session = ENGINES["onnxruntime"].open(self.programs[name], self.signature, settings)
        count = len(next(iter(self.inputs.values())))
        parts = [{n: a[i : i + 25] for n, a in self.inputs.items()} for i in range(0, count, 25)]
        return np.concatenate([session.run(part)[0] for part in parts])

    def cosines(self, name: str) -> NDArray[Any]:
        a, b = self.outputs(FLOAT), self.outputs(name)
        return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))

    def size_bytes(self, name: str) -> int:
        return self.programs[name].stat().st_size


def exported(net: nn.Module, signature: Signature, example: Arrays, folder: Path) -> Path:
    path = folder / "float.onnx"
    export_onnx(net.eval(), {name: torch.from_numpy(array) for name, array in example.items()}, signature, path)
    return path


def ours(source: Path, params: Params, calibration: Sequence[Arrays], folder: Path) -> Path:
    target = folder / f"ours-{getattr(params, 'num_bits')}.onnx"  # noqa: B009
    run = ProgramRun(calibration, folder, threads=usable_cores())
    outcome = apply_to_program(source, target, params, run)
    console.print(
        f"[dim]{len(outcome.changed)} layers changed, {len(outcome.skipped)} left. {' '.join(outcome.notes)}[/]"
    )
    return target


def peers(source: Path, folder: Path) -> Path:
    """`quantize_dynamic` as it is by default, given folded constants: without, it finds no LSTM weights at all."""
    from onnxruntime.quantization import quantize_dynamic

    target = folder / "peer.onnx"
    quantize_dynamic(fold_constants(load(source), folder, usable_cores()), target)
    return target


def raced(contest: Contest, first: str, second: str, quick: bool, seed: int) -> dict[str, float]:
    """Latency of the second over that of the first, with its interval, each in a process of its own."""
    folders = []
    example = {name: array[:2] for name, array in contest.inputs.items()}
    for name in (first, second):
        settings = SessionSettings(usable_cores())
        check = ENGINES["onnxruntime"].open(contest.programs[name], contest.signature, settings).run(example)
        folder = contest.folder / "artifacts" / name.replace(" ", "_")
        manifest = Manifest("onnxruntime", "int8", contest.signature)
        if not (folder / PROGRAM).exists():
            artifacts.save_program(folder, contest.programs[name], manifest, OutputCheck(example, check))
        folders.append(folder)
    batches = {}
    for name, count in ((LATENCY, 1), (THROUGHPUT, 16)):
        batches[name] = contest.folder / f"{name}.npz"
        np.savez(batches[name], **{n: a[:count] for n, a in contest.inputs.items()})
    bench = TimingSetup(batches=batches, batch=16, threads=usable_cores(), cwd=contest.folder)
    timing = time_artifacts(folders, bench, PLANS["quick" if quick else "standard"], seed)[1]
    if isinstance(timing, OmgoptimError) or timing.speedup is None:
        raise SystemExit(f"{contest.name} could not be measured: {timing}")
    ratio = timing.speedup
    low, high = (1 / end if end else float("nan") for end in (ratio.high, ratio.low))
    return {"time_ratio": 1 / ratio.value, "low": low, "high": high}


def lstm(folder: Path, quick: bool, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    net, weights = Speaker(), f"drawn from the seed, {SPREAD} times PyTorch's spread"
    with torch.no_grad():
        for parameter in net.lstm.parameters():
            parameter.mul_(SPREAD)
    if importlib.util.find_spec("resemblyzer"):
        state = torch.load(located("resemblyzer", "Resemblyzer") / "pretrained.pt", weights_only=True)["model_state"]
        net.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("similarity")})
        weights = "Resemblyzer's"
    inputs = {"mels": np.random.default_rng(seed).standard_normal((64, 160, 40), np.float32)}
    signature = Signature((InputTensor("mels", "float32", ("batch", 160, 40), False),), "tensor")
    source = exported(net, signature, {"mels": inputs["mels"][:2]}, folder)
    programs = {FLOAT: source, PEER: peers(source, folder), OURS: ours(source, Dynamic(), (), folder)}
    contest = Contest("lstm", programs, signature, inputs, folder)
    against_peer = raced(contest, PEER, OURS, quick, seed)
    against_float = raced(contest, FLOAT, OURS, quick, seed)
    cosines = {name: contest.cosines(name) for name in (PEER, OURS)}
    show(contest, {name: f"{cosines[name].min():.5f}" if name in cosines else "-" for name in programs}, "least cosine")
    return {
        "weights": weights,
        "bars": [
            bar("LSTM: least cosine with float32", float(cosines[OURS].min()), 0.998, at_least=True),
            bar("LSTM: time / quantize_dynamic's", against_peer["time_ratio"], 1.05, at_least=False),
        ],
        "least_cosine_of_peer": float(cosines[PEER].min()),
        "against_peer": against_peer,
        "against_float": against_float,
        "size_bytes": {name: contest.size_bytes(name) for name in programs},
    }


def gru(folder: Path, quick: bool, seed: int) -> dict[str, Any]:
    epochs = 1 if quick else EPOCHS
    net = DeepReader()
    net.load_state_dict(load_file(taught(DeepReader, watch("train"), "gru", seed, CACHE, epochs, LEARNING_RATE)))
    pairs = list(torch.utils.data.DataLoader(watch("eval"), 512))
    inputs = {"x": torch.cat([x for x, _ in pairs]).numpy()}
    labels = torch.cat([y for _, y in pairs]).numpy()
    signature = Signature((InputTensor("x", "float32", ("batch", 50, 6), False),), "tensor")
    source = exported(net, signature, {"x": inputs["x"][:2]}, folder)
    programs = {FLOAT: source, PEER: peers(source, folder), OURS: ours(source, Dynamic(), (), folder)}
    contest = Contest("gru", programs, signature, inputs, folder)
    timing = raced(contest, FLOAT, OURS, quick, seed)
    accuracy = {name: float((contest.outputs(name).argmax(1) == labels).mean()) for name in programs}
    show(contest, {name: f"{value:.4f}" for name, value in accuracy.items()}, f"accuracy on {len(labels)} windows")
    smaller = contest.size_bytes(FLOAT) / contest.size_bytes(OURS)
    return {
        "bars": [
            bar("GRU: float32 file / ours, bytes", smaller, 3.5, at_least=True),
            bar("GRU: time / ONNX Runtime float32's", timing["time_ratio"], 1.05, at_least=False),
            bar("GRU: accuracy lost", accuracy[FLOAT] - accuracy[OURS], 0.005, at_least=False),
        ],
        "accuracy": accuracy,
        "against_float": timing,
        "size_bytes": {name: contest.size_bytes(name) for name in programs},
    }


def minilm(folder: Path, quick: bool, seed: int) -> dict[str, Any]:
    sys.path.insert(0, str(EXAMPLES))
    import minilm as example

    batches = [{n: t.numpy() for n, t in batch.items()} for batch in example.load("calibration")]
    held_out = [{n: t.numpy() for n, t in batch.items()} for batch in example.load("eval")]
    inputs = {name: np.concatenate([batch[name] for batch in held_out]) for name in held_out[0]}
    names = ("input_ids", "attention_mask")
    signature = Signature(tuple(InputTensor(n, "int64", ("batch", example.LENGTH), True) for n in names), "tensor")
    source = exported(example.build(), signature, {name: array[:2] for name, array in inputs.items()}, folder)
    programs = {FLOAT: source}
    for num_bits in (4,) if quick else (4, 8):
        programs[f"{OURS}, {num_bits} bits"] = ours(source, WeightOnly(num_bits=num_bits), batches, folder)
    contest = Contest("minilm", programs, signature, inputs, folder)
    packed = {name: linear_bytes(path) for name, path in programs.items() if name != FLOAT}
    cosines = {name: contest.cosines(name) for name in packed}
    timings = {name: raced(contest, FLOAT, name, quick, seed) for name in packed}
    show(contest, {name: f"{c.mean():.5f}" for name, c in cosines.items()}, "mean cosine")
    four = f"{OURS}, 4 bits"
    for name, timing in timings.items():
        console.print(f"{name}: time / float32's {timing['time_ratio']:.3f}")
    return {
        "bars": [
            bar("MiniLM, 4 bits: Linear bytes / float32's", packed[four], 0.3, at_least=False),
            bar("MiniLM, 4 bits: mean cosine with float32", float(cosines[four].mean()), 0.98, at_least=True),
        ],
        "linear_bytes": packed,
        "mean_cosine": {name: float(c.mean()) for name, c in cosines.items()},
        "least_cosine": {name: float(c.min()) for name, c in cosines.items()},
        "against_float": timings,
        "size_bytes": {name: contest.size_bytes(name) for name in programs},
    }


def linear_bytes(program: Path) -> float:
    """Bytes of the packed weights with their scales and zero points, over those of the same weights in float32."""
    model = onnx.load(str(program))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    unpacked = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    weights = {node.input[0] for node in unpacked}
    stored = sum(tensor_bytes(tensors[name]) for name in {name for node in unpacked for name in node.input})
    return stored / sum(4 * int(np.prod(tensors[name].dims)) for name in weights)


def show(contest: Contest, quality: Mapping[str, str], metric: str) -> None:
    rows = [(name, f"{contest.size_bytes(name) / 1e6:.3f}", quality.get(name, "-")) for name in contest.programs]
    table(contest.name, ("", "MB", metric), rows)


PARTS = {"lstm": lstm, "gru": gru, "minilm": minilm}


def main() -> None:
    parser = argparse.ArgumentParser(description="recurrent layers in int8, Linear layers in 4 bits")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run: single launches, no claim")
    asked = parser.parse_args()
    began = machine()
    done: dict[str, Any] = {}
    for part in asked.parts:
        with tempfile.TemporaryDirectory(prefix=f"omgoptim-{part}-") as folder:
            done[part] = PARTS[part](Path(folder), asked.quick, asked.seed)
    keep("quantize_recurrent", asked.seed, asked.quick, began, {"parts": done})
    missed = sum(not judged["held"] for part in done.values() for judged in part["bars"])
    console.print(f"{missed} bars missed" if missed else "every bar held")


if __name__ == "__main__":
    main()
