"""Does factorization keep more than its peers do, and does training bring the rest back? MiniLM at half its Linears.

Without training: each Linear of the encoder at half of its parameters, by plain SVD, by SVD of the whitened weight (the
two as papers describe them, written here from torch.linalg alone), and by omgoptim. Per seed other sentences calibrate
and are scored. Then the whole command once: a target for the whole model, with recovery.

    python benchmarks/factorize.py [--seeds 0 1 2] [--epochs 3] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from record import bar, console, keep, machine, table
from torch import Tensor, nn

import omgoptim
from omgoptim.hardware import usable_cores
from omgoptim.measure.size import count_params
from omgoptim.models.samples import Samples
from omgoptim.requests.factorize import Whitened
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.registry import ModuleRun, apply_to_module

EXAMPLE = Path(__file__).parent.parent / "examples" / "minilm.py"
CALIBRATION, SCORED = 256, 200
HALF = 0.5
TARGET = 1.306
"""Parameters of the whole model, before over after, that halving each Linear of the encoder comes to."""

SIGNATURE = Signature(
    tuple(InputTensor(name, "int64", ("batch", 128), True) for name in ("input_ids", "attention_mask")), "tensor"
)

DATA = """
from minilm import LENGTH, MODEL_DIR, sentences
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

SPLITS = {"train": slice(0, 1100), "calibration": slice(1100, 1350), "eval": slice(1350, 1750)}

def load(split):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    tokens = tokenizer(sentences()[SPLITS[split]], **options)
    names = ("input_ids", "attention_mask")
    rows = [dict(zip(names, pair)) for pair in zip(*(tokens[name] for name in names))]
    return DataLoader(rows, 32, shuffle=split == "train")
"""

Factorize = Callable[[nn.Module, list[dict[str, Tensor]], int], nn.Module]


@dataclass(frozen=True, slots=True)
class Result:
    """One arm on one draw of sentences."""

    cosine: float
    """Mean over the scored sentences, of the pooled embedding with the original's."""
    linears: float
    """Fraction of the encoder's Linear parameters that is left."""


def minilm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minilm", EXAMPLE)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{EXAMPLE} is not there")
    module = importlib.util.module_from_spec(spec)
    sys.modules["minilm"] = module
    spec.loader.exec_module(module)
    return module


def tokens(example: ModuleType, texts: list[str]) -> list[dict[str, Tensor]]:
    tokenizer = example.AutoTokenizer.from_pretrained(example.MODEL_DIR)
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    return [
        {name: found[name][start : start + 32] for name in ("input_ids", "attention_mask")}
        for start in range(0, len(texts), 32)
    ]


def linears(net: nn.Module) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in net.named_modules() if isinstance(layer, nn.Linear)}


def rank_of(layer: nn.Linear) -> int:
    """The rank at which two factors have half of the weight's entries."""
    return int(HALF * layer.weight.numel() / (layer.in_features + layer.out_features))


def product(layer: nn.Linear, left: Tensor, right: Tensor) -> nn.Sequential:
    """Two Linears for weight = left @ right, left (out, rank) and right (rank, in)."""
    first = nn.Linear(layer.in_features, right.shape[0], bias=False)
    second = nn.Linear(right.shape[0], layer.out_features)
    with torch.no_grad():
        first.weight.copy_(right)
        second.weight.copy_(left)
        second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def plain_svd(net: nn.Module, calibration: list[dict[str, Tensor]], seed: int) -> nn.Module:
    """torch.linalg.svd of each weight, cut."""
    del calibration, seed
    done = copy.deepcopy(net)
    for path, layer in linears(done).items():
        u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        rank = rank_of(layer)
        root = s[:rank].sqrt()
        done.set_submodule(path, product(layer, u[:, :rank] * root, root[:, None] * v[:rank]))
    return done


def plain_whitening(net: nn.Module, calibration: list[dict[str, Tensor]], seed: int) -> nn.Module:
    """SVD-LLM's truncation (arXiv:2403.07378): the SVD of W S, S the Cholesky factor of the inputs' second moment."""
    del seed
    done = copy.deepcopy(net)
    moments: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            moments[path] = moments.get(path, torch.zeros(())) + rows.T @ rows

        return hook

    hooks = [layer.register_forward_pre_hook(watch(path)) for path, layer in linears(done).items()]
    with torch.no_grad():
        for batch in calibration:
            done(**batch)
    for hook in hooks:
        hook.remove()
    for path, layer in linears(done).items():
        moment = moments[path]
        factor = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment)))
        u, s, v = torch.linalg.svd(layer.weight.detach().double() @ factor, full_matrices=False)
        rank = rank_of(layer)
        right = torch.linalg.solve_triangular(factor.T, v[:rank].T, upper=True).T
        done.set_submodule(path, product(layer, u[:, :rank] * s[:rank], right))
    return done


def ours(net: nn.Module, calibration: list[dict[str, Tensor]], seed: int, params: Whitened) -> nn.Module:
    done = copy.deepcopy(net)
    batches = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in calibration]
    samples = Samples(batches, [None] * len(batches))
    with tempfile.TemporaryDirectory(prefix="omgoptim-factorize-") as scratch:
        run = ModuleRun(SIGNATURE, samples, lambda outputs, _: outputs.square().mean(), net, Path(scratch), seed)
        apply_to_module(done, params, run)
    return done


ARMS: dict[str, Factorize] = {
    "plain SVD": plain_svd,
    "plain whitening": plain_whitening,
    "omgoptim, half of each": lambda net, data, seed: ours(net, data, seed, Whitened(rank_ratio=HALF)),
    "omgoptim, shared out": lambda net, data, seed: ours(net, data, seed, Whitened(target_compression=TARGET)),
}


@torch.no_grad()
def embeddings(net: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([net(**batch) for batch in batches])


def run_seed(example: ModuleType, net: nn.Module, seed: int) -> dict[str, Result]:
    texts = example.sentences()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1000 + seed)).tolist()
    drawn = [texts[index] for index in order[: CALIBRATION + SCORED]]
    calibration, scored = tokens(example, drawn[:CALIBRATION]), tokens(example, drawn[CALIBRATION:])
    expected = embeddings(net, scored)
    params, weights = count_params(net)[0], sum(layer.weight.numel() for layer in linears(net).values())
    results = {}
    for name, factorize in ARMS.items():
        done = factorize(net, calibration, seed)
        cosine = nn.functional.cosine_similarity(embeddings(done, scored), expected).mean()
        results[name] = Result(float(cosine), 1 - (params - count_params(done)[0]) / weights)
        console.print(f"[dim]seed {seed}, {name}: {results[name].cosine:.4f}[/]")
    return results


def whole_command(epochs: int, recover: str, timing: str) -> dict[str, Any]:
    """`omgoptim factorize` from a project, with recovery; its numbers come from the reopened artifact."""
    with tempfile.TemporaryDirectory(prefix="omgoptim-factorize-") as scratch:
        folder = Path(scratch).resolve()
        shutil.copy(EXAMPLE, folder)
        (folder / "pairs.py").write_text(DATA)
        os.environ["OMGOPTIM_PROJECT"] = str(folder)
        os.chdir(folder)
        goal = {"target_compression": TARGET, "epochs": epochs, "recover": recover, "max_quality_drop": 1}
        report = omgoptim.factorize("minilm.py:build", data="pairs.py:load", timing=timing, **goal)
        console.print(f"[dim]recover {recover}: {report.summary}[/]")
    (only,) = report.rounds
    if report.before is None or report.after is None or report.gains is None:
        raise SystemExit("the report lacks its numbers")
    taken, lost = only.quality_taken or 0.0, 1 - (only.quality_taken or 0.0)
    back = ((only.quality_trained or taken) - taken) / lost
    return {
        "recover": recover,
        "compression": (report.before.params or 0) / (report.after.params or 1),
        "cosine_taken": taken,
        "cosine_trained": only.quality_trained,
        "cosine_evaluated": report.after.quality,
        "back": back,
        "speedup": report.gains.speedup,
        "speedup_low": report.gains.speedup_low,
        "size_ratio": report.gains.size_ratio,
        "trained_params": report.training.trained_params if report.training else None,
        "seconds": report.training.seconds if report.training else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="factorization of MiniLM against plain SVD and plain whitening")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--part", choices=("arms", "command", "both"), default="both")
    parser.add_argument("--recover", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, one epoch, no claim")
    asked = parser.parse_args()
    seeds, epochs = (asked.seeds[:1], 1) if asked.quick else (asked.seeds, asked.epochs)
    began = machine()
    torch.set_num_threads(usable_cores())
    if asked.part in ("arms", "both"):
        bars, kept = without_training(seeds)
        keep("factorize", seeds[0], asked.quick, began, {"bars": bars, "results": kept})
    if asked.part in ("command", "both"):
        bars, recovered = with_recovery(epochs, asked.recover)
        keep("factorize_recovery", 0, asked.quick, began, {"bars": bars, "recovered": recovered})


def without_training(seeds: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every arm on every draw of sentences."""
    example = minilm()
    net = example.build()
    results = {seed: run_seed(example, net, seed) for seed in seeds}

    def mean(name: str, what: str = "cosine") -> float:
        return statistics.fmean(getattr(result[name], what) for result in results.values())

    rows = [
        (name, mean(name), ", ".join(f"{r[name].cosine:.4f}" for r in results.values()), mean(name, "linears"))
        for name in ARMS
    ]
    table("mean cosine with the original, no training", ("", "mean", "by seed", "Linear parameters left"), rows)
    half = mean("omgoptim, half of each")
    ahead = half - mean("plain whitening")
    bars = [
        bar("half of each Linear, no training: cosine", half, 0.776, at_least=True),
        bar("half of each Linear: ahead of plain whitening", ahead, 0, at_least=True),
    ]
    return bars, {str(seed): {name: asdict(r) for name, r in each.items()} for seed, each in results.items()}


def with_recovery(epochs: int, kinds: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The whole command with each kind of recovery; a single launch, since no speed is claimed."""
    recovered = [whole_command(epochs, kind, "quick") for kind in kinds]
    table(
        f"whole command, {TARGET}x fewer parameters, {epochs} epochs",
        ("", *(str(each["recover"]) for each in recovered)),
        [(name, *(each[name] for each in recovered)) for name in recovered[0] if name != "recover"],
    )
    off = max(abs(each["compression"] / TARGET - 1) for each in recovered)
    best = max(each["back"] for each in recovered)
    bars = [
        bar("recovery: fraction of the lost cosine back", best, 0.5, at_least=True),
        bar("target compression: farthest from it", off, 0.02, at_least=False),
    ]
    return bars, recovered


if __name__ == "__main__":
    main()
