"""What an engineer would script: Torch-Pruning at three ratios, fine-tuning, NNCF; the ratio chosen on held-out data.

    python benchmarks/prune_then_quantize.py EXAMPLE.py FOLDER --seconds 300 --guard 0.01

Images with labels are fine-tuned with cross-entropy; sentences without labels on the cosine with the original's
embeddings, and of a transformer the hidden units of the MLPs and the attention heads are pruned. Writes
FOLDER/model.onnx and FOLDER/chosen.json. The evaluation split is not read.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from bare_engines import nncf_onnx
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

RATIOS = (0.2, 0.35, 0.5)
MOST_EPOCHS = 40
"""As for `optimize`."""

BATCH = 32
RATE, TRANSFORMER_RATE = 1e-3, 1e-4
"""Peak learning rates."""

Batch = tuple[dict[str, Tensor], Tensor | None]
"""Inputs by name, and labels where there are any."""


def batches_of(data: Any, net: nn.Module, shuffle: bool = False) -> list[Batch]:
    """The samples of a split, as batches of `BATCH`."""
    names = list(inspect.signature(net.forward).parameters)
    samples = data.dataset if isinstance(data, DataLoader) else data
    found: list[Batch] = []
    for item in DataLoader(samples, BATCH, shuffle=shuffle):
        labelled = not isinstance(item, dict)
        inputs = dict(zip(names, item[:-1], strict=False)) if labelled else dict(item)
        found.append((inputs, item[-1] if labelled else None))
    return found


def pruned(net: nn.Module, ratio: float, example: dict[str, Tensor]) -> nn.Module:
    """Torch-Pruning's group magnitude, as its documentation has it; the outputs keep their width."""
    import torch_pruning

    smaller = copy.deepcopy(net)
    attention = [module for module in smaller.modules() if hasattr(module, "num_attention_heads")]
    linears = [layer for layer in smaller.modules() if isinstance(layer, nn.Linear)]
    options: dict[str, Any] = {"ignored_layers": linears[-1:]}
    if attention:
        projections = [layer for module in attention for layer in (module.query, module.key, module.value)]
        grown = [layer for layer in linears if layer.out_features > layer.in_features]
        kept = {id(layer) for layer in (*projections, *grown)}
        stream = [layer for layer in linears if id(layer) not in kept]
        stream += [layer for layer in smaller.modules() if isinstance(layer, (nn.Embedding, nn.LayerNorm))]
        heads = {
            layer: module.num_attention_heads
            for module in attention
            for layer in (module.query, module.key, module.value)
        }
        options = {"ignored_layers": stream, "num_heads": heads, "prune_head_dims": False}
        options |= {"prune_num_heads": True, "head_pruning_ratio": ratio}
    pruner = torch_pruning.pruner.BasePruner(
        smaller,
        example if attention else next(iter(example.values())),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        **options,
    )
    pruner.step()
    for module in attention:
        module.num_attention_heads = pruner.num_heads[module.query]
        module.all_head_size = module.query.out_features
    return smaller


def loss_of(net: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor], labels: Tensor | None) -> Tensor:
    if labels is not None:
        return F.cross_entropy(net(**inputs), labels)
    with torch.no_grad():
        wanted = teacher(**inputs)
    return 1 - F.cosine_similarity(net(**inputs), wanted).mean()


def fine_tuned(
    net: nn.Module, teacher: nn.Module, train: Callable[[], list[Batch]], seconds: float, seed: int
) -> tuple[nn.Module, int]:
    """AdamW with one cycle, for as many epochs as the time allows by what the first one takes."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    _epochs(copy.deepcopy(net), teacher, train, 1)
    epochs = int(min(MOST_EPOCHS, max(1, seconds / (time.perf_counter() - began) - 1)))
    return _epochs(net, teacher, train, epochs), epochs


def _epochs(net: nn.Module, teacher: nn.Module, train: Callable[[], list[Batch]], epochs: int) -> nn.Module:
    net.train()
    rate = TRANSFORMER_RATE if any(isinstance(layer, nn.LayerNorm) for layer in net.modules()) else RATE
    optimizer = torch.optim.AdamW(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * len(train()))
    for _ in range(epochs):
        for inputs, labels in train():
            optimizer.zero_grad()
            loss_of(net, teacher, inputs, labels).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def quantized(net: nn.Module, folder: Path, calibration: list[Batch]) -> Path:
    """Export the net and quantize it with NNCF's defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "float.onnx", folder / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = {name: tensor[:2] for name, tensor in calibration[0][0].items()}
    torch.onnx.export(
        net, kwargs=example, f=str(source), input_names=list(example), dynamo=True,
        dynamic_shapes={name: {0: batch} for name in example}, external_data=False, verbose=False,
    )  # fmt: skip
    nncf_onnx(source, target, [{name: tensor.numpy() for name, tensor in inputs.items()} for inputs, _ in calibration])
    return target


def quality(outputs: Callable[[dict[str, Tensor]], NDArray[Any]], teacher: nn.Module, batches: list[Batch]) -> float:
    """Accuracy; without labels the mean cosine with the original."""
    scores = []
    for inputs, labels in batches:
        found = outputs(inputs)
        if labels is not None:
            scores.append(found.argmax(1) == labels.numpy())
            continue
        with torch.inference_mode():
            wanted = teacher(**inputs)
        scores.append(F.cosine_similarity(torch.from_numpy(found), wanted).numpy())
    return float(np.concatenate(scores).mean())


def runs(program: Path) -> Callable[[dict[str, Tensor]], NDArray[Any]]:
    session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])
    return lambda inputs: np.asarray(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("example", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--guard", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    sys.path.insert(0, str(asked.example.parent))
    example = runpy.run_path(str(asked.example))
    net: nn.Module = example["build"]()
    whole = batches_of(example["load"]("calibration"), net)
    half = len(whole) // 2
    calibration, selection = whole[:half], whole[half:]

    def train() -> list[Batch]:
        return batches_of(example["load"]("train"), net, shuffle=True)

    def original(inputs: dict[str, Tensor]) -> NDArray[Any]:
        with torch.inference_mode():
            return np.asarray(net(**inputs).numpy())

    before = quality(original, net, selection)
    tried = []
    for ratio in RATIOS:
        smaller = pruned(net, ratio, {name: tensor[:1] for name, tensor in whole[0][0].items()})
        smaller, epochs = fine_tuned(smaller, net, train, asked.seconds / len(RATIOS), asked.seed)
        program = quantized(smaller, asked.folder / f"ratio{ratio}", calibration)
        drop = before - quality(runs(program), net, selection)
        tried.append({"ratio": ratio, "epochs": epochs, "selection_drop": drop, "program": str(program)})
    within = [one for one in tried if one["selection_drop"] <= asked.guard]
    chosen = within[-1] if within else min(tried, key=lambda one: one["selection_drop"])
    (asked.folder / "model.onnx").write_bytes(Path(chosen["program"]).read_bytes())
    (asked.folder / "chosen.json").write_text(json.dumps({"chosen": chosen["ratio"], "tried": tried}, indent=1))


if __name__ == "__main__":
    main()
