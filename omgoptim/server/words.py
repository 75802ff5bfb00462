"""How the list of tools tells an agent of an argument, where the request's own description is longer than need be.

A tool list is paid for in every conversation: what a name, a default and the choices say is not said again, and an
empty text means just that. `omgoptim VERB --help` has every word.
"""

from __future__ import annotations

ARGUMENTS = {
    "checkpoint": "Weights: .safetensors, or .pt/.pth state dict.",
    "model_kwargs": "",
    "inputs": "Without data: shapes, batch first: 1x3x224x224 or input_ids:int64:1x128.",
    "project": "Absolute path of the project; all files must lie inside.",
    "runtime": "Engine. auto: the model's own for profile, the fastest for quantize, else torch_eager.",
    # quantize
    "scheme": "auto: the best within the guard of all that can run here. dynamic: int8, needs no data. "
    "static: int8, calibrated on data. qat: trained for int8. weight_only: small, rarely fast. bf16, fp16: half the "
    "bytes. fp32: another engine alone.",
    "effort": "Of static; best takes minutes.",
    "explain": "Tell by layer where quality and time go.",
    "num_bits": "",
    "calibration_samples": "",
    "granularity": "",
    "symmetric": "Activations too.",
    "algorithm": "",
    "range_method": "",
    "targets": "Globs on module paths: only these.",
    "ignore": "Globs on module paths: not these.",
    "max_quality_drop": "The guard: most quality that may be lost.",
    "output": "New folder for a copy of the artifact.",
    "plan": "Only say what would be done.",
    # training
    "epochs": "Of training.",
    "loss": "auto or file.py:callable = loss(outputs, targets).",
    "recover": "lora: adapters that are merged.",
    "distill": "Learn from the original's outputs too.",
    # prune
    "prune.method": "structured removes channels and heads, the others zero single weights. wanda and gradient need "
    "data; semi_structured keeps n of m; random is the control.",
    "schedule": "one_shot, linear, cubic, or the amounts: 0.5,0.75,0.9",
    "rounds": "",
    "sensitivity": "Also measure quality against the amount, layer by layer.",
    "pruning_ratio": "Channels to remove, 0..1; default 0.3.",
    "target_speedup": "Instead: as measured here.",
    "target_latency_ms": "Instead.",
    "target_macs_ratio": "Instead.",
    "importance": "taylor and hessian need data.",
    "ranking": "",
    "round_to": "",
    "max_layer_ratio": "",
    "prune_heads": "",
    "sparsity": "Zeros at the end, 0..1.",
    "scope": "",
    "layer_ratios": "",
    "score": "",
    "pattern": "",
    # optimize
    "optimize.target_latency_ms": "To reach, at batch 1.",
    "target_size_mb": "To reach on disk.",
    "target_memory_mb": "Peak memory to reach.",
    "budget_minutes": "Longest minutes in all; it trains.",
    # factorize
    "factorize.method": "whitened reads data and loses less; svd needs none.",
    "target_compression": "Parameters before over after; default 2, distill: 4.",
    "energy": "Instead: to keep, 0..1.",
    "rank": "Instead.",
    "rank_ratio": "Instead: to keep of each layer.",
    "per": "",
    "convolution": "",
    # distill
    "distill.model": "The teacher.",
    "student": "A module (file.py:callable, a run id), or derived from the teacher: auto, narrow, depthwise, "
    "inverted_residual, low_rank, fewer_layers.",
    "output_loss": "",
    "features": "Learn from inside too.",
    "control": "Also train without the teacher, and tell what it brought.",
    "keep_layers": "Of the layers that repeat.",
    "candidates": "",
    "width": "Of a derived student, 0..1.",
    "depth": "",
    "initialize": "",
    # runs
    "action": "resume: start a failed or cancelled run again. pick: deliver an alternative.",
    "run_id": "",
    "name": "",
}
"""By argument, or by `verb.argument` where two verbs mean something different by a name."""
