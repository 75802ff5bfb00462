"""Pruning for a measured speed: `omgoptim prune --target-speedup 2`, whole, against Torch-Pruning's documented loop.

Per seed the same trained R8 net. Torch-Pruning gets the smallest of its ratios whose result was measured to be at least
as fast as asked for, in the same way as ours, and as many epochs on all of the training images; ours gives 400 of them
to choosing. Then our result is quantized, and both race against the net as it was, eager, in float32.

    python benchmarks/prune_speed.py [--runtime onnxruntime] [--seeds 0 1 2] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune import TUNING, statistics_of
from pruning_nets import EPOCHS, Digits, accuracy, digits, fine_tuned, trained
from record import bar, console, keep, machine, table
from safetensors.torch import save_file
from torch import nn

import omgoptim
from omgoptim.errors import OmgoptimError
from omgoptim.hardware import usable_cores
from omgoptim.measure.launch import LATENCY, THROUGHPUT, TimingPlan
from omgoptim.measure.measuring_process import TimingSetup
from omgoptim.measure.timing import time_artifacts
from omgoptim.models import artifact as artifacts
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import build
from omgoptim.models.structural_diff import compute_diff
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.training.batch_norm import reestimate

SPEEDUP = 2.0
SCORED = 3000
MODEL, DATA = "pruning_project.py:build", "pruning_project.py:load"
SIGNATURE = Signature((InputTensor("x", "float32", ("batch", 1, 28, 28), False),), "tensor")
PEERS_TIMING = TimingPlan(launches=3, most_launches=3, rounds=3, throughput_launches=0)
"""As many launches as omgoptim's own search makes of a cut."""

RATIOS = tuple(step / 20 for step in range(4, 17))
"""Torch-Pruning's ratios to try, ascending; found by bisection."""


@dataclass(frozen=True, slots=True)
class Result:
    """One seed."""

    untouched: float
    ours: float
    """Accuracy of the pruned and trained net, from the report."""
    ours_speedup: float
    ours_low: float
    ours_outcome: str
    theirs: float
    theirs_speedup: float
    theirs_ratio: float
    quantized: float
    """Accuracy of ours, quantized."""
    quantized_speedup: float
    """Against the net as it was, eager, float32."""
    quantized_low: float
    size_ratio: float


def project(net: nn.Module, folder: Path) -> dict[str, Any]:
    """A project with the net's weights; the arguments that name it."""
    here = Path(__file__).parent
    for name in ("pruning_nets.py", "pruning_project.py"):
        shutil.copy(here / name, folder)
    save_file(net.state_dict(), folder / "net.safetensors")
    os.environ["OMGOPTIM_PROJECT"] = str(folder)
    os.chdir(folder)
    return {"data": DATA, "model_kwargs": {"weights": str(folder / "net.safetensors")}}


def saved(net: nn.Module, folder: Path, weights: Path, name: str, runtime: str) -> Path:
    """A net of whatever widths as an artifact of an engine, so that it is measured as ours are."""
    if ENGINES[runtime].runs == "program":
        return program(net, folder, name, runtime)
    recipe = Recipe("callable", MODEL, {"weights": str(weights)}, str(folder))
    diff = compute_diff(build(recipe, PathPolicy(folder)), net)
    example = {"x": np.zeros((2, 1, 28, 28), np.float32)}
    settings = SessionSettings(usable_cores())
    outputs = ENGINES["torch_eager"].open(net, SIGNATURE, settings).run(example)
    manifest = Manifest("torch_eager", "float32", SIGNATURE)
    whole = Recipe("callable", MODEL, {"weights": str(weights)}, str(folder), structural_diff=diff)
    artifacts.save_module(folder / name, net, whole, manifest, OutputCheck(example, outputs))
    return folder / name


def program(net: nn.Module, folder: Path, name: str, runtime: str) -> Path:
    example = {"x": np.zeros((2, 1, 28, 28), np.float32)}
    path = folder / f"{name}.onnx"
    export_onnx(net, {"x": torch.zeros(2, 1, 28, 28)}, SIGNATURE, path)
    outputs = ENGINES[runtime].open(path, SIGNATURE, SessionSettings(usable_cores())).run(example)
    artifacts.save_program(folder / name, path, Manifest(runtime, "float32", SIGNATURE), OutputCheck(example, outputs))
    return folder / name


def measured(before: Path, after: Path, folder: Path, data: Digits, seed: int) -> float:
    """Latency of one artifact over another's."""
    batches = {}
    for name, count in ((LATENCY, 1), (THROUGHPUT, 32)):
        batches[name] = folder / f"{name}.npz"
        np.savez(batches[name], x=data.test_images[:count].numpy())
    bench = TimingSetup(batches=batches, batch=32, threads=usable_cores(), cwd=folder)
    timing = time_artifacts([before, after], bench, PEERS_TIMING, seed)[1]
    if isinstance(timing, OmgoptimError) or timing.speedup is None:
        raise SystemExit(f"the peer could not be measured: {timing}")
    return timing.speedup.value


def torch_pruning(net: nn.Module, ratio: float, data: Digits) -> nn.Module:
    """Torch-Pruning's group magnitude at one ratio, as its documentation has it, with our re-estimation."""
    import torch_pruning

    pruned = copy.deepcopy(net)
    torch_pruning.pruner.BasePruner(
        pruned,
        data.train_images[:1],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[layer for layer in pruned.modules() if isinstance(layer, nn.Linear)],
    ).step()
    reestimate(pruned, SIGNATURE, statistics_of(data))
    return pruned


def theirs(
    net: nn.Module, folder: Path, data: Digits, seed: int, epochs: int, runtime: str
) -> tuple[float, float, float]:
    """Accuracy, speedup and ratio of the gentlest ratio that is fast enough; of the largest if none is."""
    weights = folder / "net.safetensors"
    before = saved(net, folder, weights, "before", runtime)
    low, high = 0, len(RATIOS) - 1
    speeds: dict[int, float] = {}
    while low < high:
        middle = (low + high) // 2
        pruned = torch_pruning(net, RATIOS[middle], data)
        speeds[middle] = measured(before, saved(pruned, folder, weights, f"peer{middle}", runtime), folder, data, seed)
        low, high = (low, middle) if speeds[middle] >= SPEEDUP else (middle + 1, high)
    chosen = torch_pruning(net, RATIOS[low], data)
    if low not in speeds:
        speeds[low] = measured(before, saved(chosen, folder, weights, f"peer{low}", runtime), folder, data, seed)
    return accuracy(fine_tuned(chosen, data, epochs, seed), data), speeds[low], RATIOS[low]


def run_seed(data: Digits, seed: int, cache: Path, quick: bool, runtime: str) -> Result:
    net = trained(8 if quick else 24, data, seed, cache, 2 if quick else EPOCHS)
    epochs, timing = (1, "quick") if quick else (TUNING, "standard")
    with tempfile.TemporaryDirectory(prefix="omgoptim-prune-speed-") as scratch:
        folder = Path(scratch).resolve()
        common = project(net, folder)
        common["model_kwargs"]["width"] = 8 if quick else 24
        goal = {"target_speedup": SPEEDUP, "epochs": epochs, "max_quality_drop": 0.02, "seed": seed, "samples": SCORED}
        pruned = omgoptim.prune(MODEL, **common, **goal, timing=timing, runtime=runtime)
        console.print(f"[dim]seed {seed}: {pruned.summary}[/]")
        chained = {"data": DATA, "max_quality_drop": 0.02, "timing": timing, "samples": SCORED}
        quantized = omgoptim.quantize(pruned.run_id, **chained)
        plain = saved(net, folder, folder / "net.safetensors", "eager", "torch_eager")
        raced = omgoptim.compare(str(plain), quantized.run_id, data=DATA, timing=timing, samples=SCORED)
        console.print(f"[dim]seed {seed}: {raced.summary}[/]")
        peer = theirs(net, folder, data, seed, epochs, runtime) if not quick else (0.0, 0.0, 0.0)
    gained, whole = pruned.gains, raced.gains
    if gained is None or whole is None or pruned.after is None or raced.after is None or raced.before is None:
        raise SystemExit("a report lacks its numbers")
    return Result(
        untouched=raced.before.quality or 0.0,
        ours=pruned.after.quality or 0.0,
        ours_speedup=gained.speedup or 0.0,
        ours_low=gained.speedup_low or 0.0,
        ours_outcome=pruned.outcome,
        theirs=peer[0],
        theirs_speedup=peer[1],
        theirs_ratio=peer[2],
        quantized=raced.after.quality or 0.0,
        quantized_speedup=whole.speedup or 0.0,
        quantized_low=whole.speedup_low or 0.0,
        size_ratio=whole.size_ratio or 0.0,
    )


def eval_mode(results: list[Result]) -> list[dict[str, Any]]:
    """The bars, set before anything was measured; means over seeds, accuracies in points."""

    def mean(what: str) -> float:
        return statistics.fmean(getattr(result, what) for result in results)

    return [
        bar("2x measured: points ahead of Torch-Pruning", 100 * (mean("ours") - mean("theirs")), 0, at_least=True),
        bar("2x measured: points lost", 100 * (mean("untouched") - mean("ours")), 0.5, at_least=False),
        bar("2x measured: smallest speedup", min(result.ours_speedup for result in results), 2, at_least=True),
        bar("pruned and quantized: speedup over eager", mean("quantized_speedup"), 5, at_least=True),
        bar("pruned and quantized: points lost", 100 * (mean("untouched") - mean("quantized")), 1, at_least=False),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="pruning for a measured speed, against Torch-Pruning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runtime", default="torch_eager", help="the engine that both are pruned for and measured on")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "omgoptim-pruning-nets")
    parser.add_argument("--quick", action="store_true", help="a smoke run: a small net, one seed, no peer, no claim")
    asked = parser.parse_args()
    seeds = asked.seeds[:1] if asked.quick else asked.seeds
    began, data = machine(), digits()
    torch.set_num_threads(usable_cores())
    results = [run_seed(data, seed, asked.cache, asked.quick, asked.runtime) for seed in seeds]
    names = list(asdict(results[0]))
    table("by seed", ("", *map(str, seeds)), [(name, *(asdict(result)[name] for result in results)) for name in names])
    bars = eval_mode(results)
    by_seed = {str(seed): asdict(result) for seed, result in zip(seeds, results, strict=True)}
    keep(
        f"prune_speed_{asked.runtime}",
        seeds[0],
        asked.quick,
        began,
        json.loads(json.dumps({"bars": bars, "results": by_seed})),
    )


if __name__ == "__main__":
    main()
