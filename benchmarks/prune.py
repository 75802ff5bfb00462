"""Does pruning keep more than its peers do? Each called by its own API on the same trained nets, in one run.

Per seed an R8 net is trained once, and everyone prunes a copy of it. Without labels: 90 % of the weights to zero, and
channels removed until at most half of the operations are left, both with batch-norm statistics estimated anew on the
same training images. Then what was cut is trained for the same two epochs by the same loop.

    python benchmarks/prune.py [--seeds 0 1 2] [--width 24] [--cache FOLDER] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pruning_nets import EPOCHS, Digits, accuracy, digits, fine_tuned, trained
from record import bar, console, keep, machine, table
from torch import nn

from omgoptim.measure.macs import count_macs
from omgoptim.models.samples import Samples
from omgoptim.requests.base import Params
from omgoptim.requests.prune import Magnitude, Structured
from omgoptim.runtimes.signature import InputTensor, Signature
from omgoptim.techniques.registry import ModuleRun, apply_to_module
from omgoptim.training.batch_norm import reestimate

SPARSITY = 0.9
OPERATIONS = 0.5
"""Fraction of the multiply-accumulates that may be left."""

TUNING = 2
"""Epochs after structured pruning."""

STATISTICS_BATCH = 100
FINEST = 0.01
"""Steps of the peer's pruning ratio: the smallest that leaves few enough operations is taken."""

HOOKS, MASK = "__nncf_hooks.post_hooks.", ".binary_mask"
"""How NNCF names the mask of a weight: HOOKS + block1:conv1:weight__0.0 + MASK."""

SIGNATURE = Signature((InputTensor("x", "float32", ("batch", 1, 28, 28), False),), "tensor")

OURS, NNCF, TORCH_PRUNING = "omgoptim", "NNCF", "Torch-Pruning"

Prune = Callable[[nn.Module, Digits, Path, int], nn.Module]
"""`prune(net, data, scratch, seed)`: a pruned net, the given one left as it is; labels are not looked at."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One contestant in one discipline."""

    discipline: str
    who: str
    prune: Prune
    epochs: int = 0
    """Of training afterwards, with labels."""

    @property
    def name(self) -> str:
        return f"{self.discipline}, {self.who}" + (f", {self.epochs} epochs" if self.epochs else "")


@dataclass(frozen=True, slots=True)
class Result:
    """One net of one arm."""

    accuracy: float
    zeros: float
    """Fraction of the weights of convolutions and Linears that are zero."""
    operations: float
    """Fraction of the multiply-accumulates that are left, zeros counted as work."""
    parameters: float
    """Fraction of the parameters that are left."""


def statistics_of(data: Digits) -> Samples:
    """The training images in batches, without their labels."""
    batches = [{"x": images.numpy()} for images in data.train_images.split(STATISTICS_BATCH)]
    return Samples(batches, [None] * len(batches))


def ours(params: Params, net: nn.Module, data: Digits, scratch: Path, seed: int) -> nn.Module:
    """A technique of omgoptim, and its re-estimation."""
    pruned = copy.deepcopy(net)
    samples = statistics_of(data)
    run = ModuleRun(SIGNATURE, samples, lambda outputs, _: outputs.square().mean(), net, scratch, seed)
    apply_to_module(pruned, params, run)
    reestimate(pruned, SIGNATURE, samples)
    return pruned


def our_zeros(net: nn.Module, data: Digits, scratch: Path, seed: int) -> nn.Module:
    return ours(Magnitude(sparsity=SPARSITY), net, data, scratch, seed)


def our_channels(net: nn.Module, data: Digits, scratch: Path, seed: int) -> nn.Module:
    return ours(Structured(target_macs_ratio=1 / OPERATIONS), net, data, scratch, seed)


def nncf_zeros(net: nn.Module, data: Digits, scratch: Path, seed: int) -> nn.Module:
    """NNCF's global magnitude and its batch-norm adaptation, as its documentation has them."""
    import nncf

    del scratch, seed
    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
    example = data.train_images[:1]
    pruned: nn.Module = nncf.prune(copy.deepcopy(net), mode, ratio=SPARSITY, examples_inputs=example)
    batches = nncf.Dataset(list(data.train_images.split(STATISTICS_BATCH)))
    state = nncf.batch_norm_adaptation(pruned, batches).state_dict()
    plain = copy.deepcopy(net)  # nncf.strip would do the same, and needs torchao
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    masks = {name: mask for name, mask in state.items() if name.endswith(MASK)}
    with torch.no_grad():
        for name, mask in masks.items():
            weight = name.removeprefix(HOOKS).rpartition("__")[0].replace(":", ".")
            plain.get_parameter(weight).mul_(mask)
    return plain


def torch_pruning_channels(net: nn.Module, data: Digits, scratch: Path, seed: int) -> nn.Module:
    """Torch-Pruning's group magnitude, layer by layer, at the smallest ratio that leaves few enough operations.

    It has no re-estimation of its own; it gets ours.
    """
    import torch_pruning

    del scratch, seed
    example = data.train_images[:1]
    wanted = OPERATIONS * operations(net)
    for step in range(1, round(1 / FINEST)):
        pruned = copy.deepcopy(net)
        torch_pruning.pruner.BasePruner(
            pruned,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=step * FINEST,
            ignored_layers=[layer for layer in pruned.modules() if isinstance(layer, nn.Linear)],
        ).step()
        if operations(pruned) <= wanted:
            break
    reestimate(pruned, SIGNATURE, statistics_of(data))
    return pruned


ARMS = (
    Arm("zeros", OURS, our_zeros),
    Arm("zeros", NNCF, nncf_zeros),
    Arm("channels", OURS, our_channels),
    Arm("channels", TORCH_PRUNING, torch_pruning_channels),
    Arm("channels", OURS, our_channels, TUNING),
    Arm("channels", TORCH_PRUNING, torch_pruning_channels, TUNING),
)


def operations(net: nn.Module) -> int:
    """Multiply-accumulates of one image."""
    macs = count_macs(net, (torch.zeros(1, 1, 28, 28),), {}).macs
    if macs is None:
        raise SystemExit("the operations of the net could not be counted")
    return macs


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def zeros(net: nn.Module) -> float:
    weights = [layer.weight for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def run_seed(width: int, data: Digits, seed: int, cache: Path, epochs: int) -> dict[str, Result]:
    """Every arm on the net of one seed; what is pruned alike is pruned once."""
    net = trained(width, data, seed, cache, epochs)
    results = {"untouched": Result(accuracy(net, data), zeros(net), 1.0, 1.0)}
    pruned: dict[Prune, nn.Module] = {}
    for arm in ARMS:
        if arm.prune not in pruned:
            with tempfile.TemporaryDirectory(prefix="omgoptim-prune-") as scratch:
                pruned[arm.prune] = arm.prune(net, data, Path(scratch), seed)
        done = fine_tuned(pruned[arm.prune], data, arm.epochs, seed) if arm.epochs else pruned[arm.prune]
        left = operations(done) / operations(net), parameters(done) / parameters(net)
        results[arm.name] = Result(accuracy(done, data), zeros(done), *left)
        console.print(f"[dim]seed {seed}, {arm.name}: {results[arm.name].accuracy:.4f}[/]")
    return results


def mean(results: list[dict[str, Result]], name: str, what: str = "accuracy") -> float:
    return statistics.fmean(getattr(result[name], what) for result in results)


def eval_mode(results: list[dict[str, Result]]) -> list[dict[str, Any]]:
    """The bars, set before anything was measured: at least the peer's accuracy, mean over seeds, in points."""

    def ahead(discipline: str, peer: str, epochs: int = 0) -> float:
        ours_, theirs = (Arm(discipline, who, our_zeros, epochs).name for who in (OURS, peer))
        return 100 * (mean(results, ours_) - mean(results, theirs))

    left = max(result[Arm("channels", OURS, our_channels).name].operations for result in results)
    at_zeros = Arm("zeros", OURS, our_zeros).name
    return [
        bar(f"{SPARSITY:.0%} zeros, no labels: points ahead of NNCF", ahead("zeros", NNCF), 0, at_least=True),
        bar("fewest zeros of a net", min(result[at_zeros].zeros for result in results), SPARSITY - 1e-5, at_least=True),
        bar("channels, no labels: points ahead of Torch-Pruning", ahead("channels", TORCH_PRUNING), 0, at_least=True),
        bar(
            f"channels, {TUNING} epochs: points ahead of Torch-Pruning",
            ahead("channels", TORCH_PRUNING, TUNING),
            0,
            at_least=True,
        ),
        bar("channels: most operations left of a net", left, OPERATIONS, at_least=False),
    ]


def show(results: list[dict[str, Result]]) -> None:
    rows = []
    for name in results[0]:
        each = ", ".join(f"{100 * result[name].accuracy:.2f}" for result in results)
        shares = (f"{mean(results, name, what):.3f}" for what in ("zeros", "operations", "parameters"))
        rows.append((name, f"{100 * mean(results, name):.2f}", each, *shares))
    table("accuracy in percent", ("", "mean", "by seed", "zeros", "operations left", "parameters left"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="omgoptim's pruning against NNCF and Torch-Pruning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "omgoptim-pruning-nets")
    parser.add_argument("--quick", action="store_true", help="a smoke run: a small net, one seed, no claim")
    asked = parser.parse_args()
    seeds, width, epochs = (asked.seeds[:1], 8, 2) if asked.quick else (asked.seeds, asked.width, EPOCHS)
    began = machine()
    data = digits()
    results = [run_seed(width, data, seed, asked.cache, epochs) for seed in seeds]
    show(results)
    kept = {
        "width": width,
        "seeds": seeds,
        "bars": eval_mode(results),
        "peers": {name: importlib.metadata.version(name) for name in ("nncf", "torch-pruning", "mlxtend")},
        "results": {
            str(seed): {name: asdict(result) for name, result in each.items()}
            for seed, each in zip(seeds, results, strict=True)
        },
    }
    keep("prune", seeds[0], asked.quick, began, kept)
    missed = sum(not judged_bar["held"] for judged_bar in kept["bars"])
    console.print(f"{missed} bars missed" if missed else "every bar held")


if __name__ == "__main__":
    main()
