"""Short descriptions of arguments in the tool list, where the request's own description is longer than need be.

A tool list is paid for in every conversation: what a name, a default and the choices say is not repeated, and an
empty text means just that. `omgoptim VERB --help` has the full descriptions.
"""

from __future__ import annotations

ARGUMENTS = {
    "model": "file.py:callable, package.module:callable, artifact folder, run id, model.pt2, model.onnx, hf:FOLDER, "
    "timm:NAME or torchvision:NAME.",
    "checkpoint": "Weights: .safetensors, or .pt/.pth state dict.",
    "data": "file.py:callable with an argument split=train|calibration|eval, or .npz/.safetensors of named arrays.",
    "model_kwargs": "",
    "inputs": "Without data: shapes, batch first: 1x3x224x224 or input_ids:int64:1x128.",
    "metric": "auto, top1, r2, cosine, perplexity, kl, a torchmetrics name, or file.py:callable; higher is better.",
    "project": "Absolute path; all files must be inside.",
    "runtime": "Engine. auto: the model's own for profile, the fastest for quantize, else torch_eager.",
    # quantize
    "scheme": "auto: the best of all within the guard. dynamic: int8, no data. static: int8, calibrated on data. "
    "qat: quantization-aware training. weight_only: smaller, rarely faster. bf16, fp16: half the bytes. fp32: other "
    "engine only.",
    "effort": "Of static; best takes minutes.",
    "explain": "Sensitivity and time per layer.",
    "num_bits": "",
    "calibration_samples": "",
    "granularity": "",
    "symmetric": "",
    "algorithm": "",
    "range_method": "",
    "targets": "Globs on module paths: only these.",
    "ignore": "Globs on module paths: not these.",
    "max_quality_drop": "Quality guard: largest allowed drop of the metric.",
    "output": "New folder for a copy of the artifact.",
    "plan": "Dry run.",
    # training
    "epochs": "Training epochs.",
    "loss": "auto or file.py:callable = loss(outputs, targets).",
    "recover": "Fine-tune all weights, LoRA (merged afterwards), or nothing.",
    "distill": "Use the original as a teacher.",
    # prune
    "prune.method": "structured removes channels and heads, the others zero single weights. wanda, gradient: need "
    "data. semi_structured: n:m. random: baseline.",
    "schedule": "one_shot, linear, cubic, or amounts: 0.5,0.75,0.9",
    "rounds": "",
    "sensitivity": "Quality against the amount, per layer.",
    "pruning_ratio": "Of channels, 0..1; default 0.3.",
    "target_speedup": "Alternative target, measured here.",
    "target_latency_ms": "Alternative target: latency in ms.",
    "target_macs_ratio": "Alternative target: MACs before / after.",
    "ranking": "",
    "round_to": "",
    "max_layer_ratio": "",
    "prune_heads": "",
    "sparsity": "Final, 0..1.",
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
    "factorize.method": "whitened: needs data, smaller error; svd: needs none.",
    "target_compression": "Parameters before / after; default 2, distill: 4.",
    "rank_ratio": "Alternative target, 0..1, per layer.",
    "per": "",
    "convolution": "",
    # distill
    "distill.model": "The teacher.",
    "student": "A module (file.py:callable, a run id), or derived from the teacher: auto, narrow, depthwise, "
    "inverted_residual, low_rank, fewer_layers.",
    "control": "Also train without the teacher, for comparison.",
    "keep_layers": "Of the repeated layers.",
    "candidates": "",
    "width": "Width multiplier, 0..1.",
    "depth": "",
    "initialize": "",
    # compare
    "a": "Baseline: run id or artifact folder.",
    "b": "Candidate: run id or artifact folder.",
    # runs
    "action": "resume: continue a failed or cancelled run. pick: select another finalist.",
    "run_id": "",
    "name": "",
}
"""By argument, or by `verb.argument` where two verbs mean something different by a name."""
