"""Dry run of quantize: candidates, layers and estimated cost; nothing is built or measured."""

from __future__ import annotations

import time

from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import find_layers, select_layers
from omgoptim.models.samples import forward_args, repeat_to_size
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import plan_step, repeat_of
from omgoptim.operations.quantization.candidates import CandidatePlan, Program
from omgoptim.operations.report_records import environment, shown_request
from omgoptim.reports import Candidate, Change, EfficiencyReport
from omgoptim.requests import Params, QuantizeRequest
from omgoptim.requests.quantize import Bf16, Dynamic, Fp16, Qat, Static, WeightOnly

INT8_OPS: dict[type[Params], tuple[str, ...]] = {
    Static: ("Conv", "ConvTranspose", "MatMul", "Gemm"),
    Qat: ("Conv", "ConvTranspose", "MatMul", "Gemm"),
    Dynamic: ("MatMul", "Gemm", "LSTM", "GRU", "RNN"),
    WeightOnly: ("MatMul", "Gemm", "LSTM", "GRU", "RNN"),
}
"""Operators that each technique quantizes."""

OPEN_S = {"module": 3.5, "program": 0.6}
"""Seconds of a fresh process to open an artifact and warm up, by kind of engine; an estimate for the dry run."""


def plan_report(
    request: QuantizeRequest, context: RunContext, loaded: LoadedModel, program: Program, plan: CandidatePlan
) -> EfficiencyReport:
    """Report planned candidates, affected layers, and estimates of time and size."""
    launches = {"quick": 1, "standard": 5, "careful": 12}[request.timing]
    samples = loaded.evaluation.count + getattr(request.scheme, "calibration_samples", 0) + 256
    build_s = 2 * samples * _seconds_per_sample(loaded) + 3.0
    seconds = len(plan.specs) * build_s + launches * (OPEN_S["module"] + OPEN_S["program"] + 4.0)
    planned = [
        Candidate(
            name=spec.name,
            scheme=spec.scheme,
            runtime=spec.runtime,
            size_bytes=_estimated_bytes(spec.params, program),
            status="planned",
            why="to be built and screened, and measured in full if among the best; the size is an estimate",
        )
        for spec in plan.specs
    ]
    touched = _planned_changes(plan, program)
    return EfficiencyReport(
        outcome="ok",
        summary=f"Dry run: {len(planned)} candidates would be built for {len(touched)} layers, "
        f"in about {max(10, round(seconds, -1)):.0f} s{_training_phrase(request)}.",
        warnings=list(loaded.notes),
        next_steps=[plan_step(request)],
        verb="quantize",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, None),
        changed=touched,
        candidates=[*planned, *plan.skipped],
        macs_check=loaded.macs.check if loaded.macs else None,
        lineage=list(loaded.lineage[:-1]),
        repeat=repeat_of("quantize", request),
    )


def _training_phrase(request: QuantizeRequest) -> str:
    if not isinstance(request.scheme, Qat):
        return ""
    epochs = request.scheme.epochs
    return f" after {epochs} epoch{'' if epochs == 1 else 's'} of training, which the estimate excludes"


def _seconds_per_sample(loaded: LoadedModel) -> float:
    """Time one forward pass in this process, as the basis of the estimate."""
    if loaded.module is None:
        return 0.02
    args, kwargs = forward_args(loaded.signature, repeat_to_size(loaded.evaluation, 1))
    import torch

    with torch.inference_mode():
        loaded.module(*args, **kwargs)
        start = time.perf_counter()
        loaded.module(*args, **kwargs)
    return time.perf_counter() - start


def _estimated_bytes(params: Params, program: Program) -> int | None:
    """Estimate the size: weights that the technique covers at their new bits plus scales, others unchanged."""
    traits = program.traits
    if traits is None:
        return None
    total = traits.total_weight_bytes
    covered = {
        Static: traits.conv_weight_bytes + traits.matmul_weight_bytes,
        Qat: traits.conv_weight_bytes + traits.matmul_weight_bytes,
        Dynamic: traits.matmul_weight_bytes + traits.recurrent_weight_bytes,
    }.get(type(params), 0)
    if isinstance(params, (Bf16, Fp16)):
        return total // 2
    if isinstance(params, WeightOnly):
        bits = params.num_bits + (32 + (0 if params.symmetric else params.num_bits)) / params.group_size
        packed = traits.matmul_weight_bytes * (1 - bits / 32)
        return total - round(packed) - traits.recurrent_weight_bytes * 3 // 4
    return total - covered * 3 // 4


def _planned_changes(plan: CandidatePlan, program: Program) -> list[Change]:
    """Return the layers that at least one int8 candidate would quantize."""
    if program.path is None:
        return []
    found = find_layers(load(program.path, weights=False))
    changes: dict[str, Change] = {}
    for spec in plan.specs:
        if isinstance(spec.params, (Static, Qat, Dynamic, WeightOnly)):
            for layer in select_layers(found, spec.params.targets, spec.params.ignore):
                if layer.op in INT8_OPS[type(spec.params)]:
                    what = f"planned: {spec.scheme}"
                    after = f"int{spec.params.num_bits}" if layer.op in ("MatMul", "Gemm") else "int8"
                    changes.setdefault(layer.path, Change(path=layer.path, what=what, before="float32", after=after))
    return list(changes.values())
