"""`plan`: what would be tried, on which layers and at what cost. Nothing is made and nothing is measured."""

from __future__ import annotations

import time

from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import find_layers, select_layers
from omgoptim.models.samples import forward_args, repeat_to_size
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import plan_step, repeat_of
from omgoptim.operations.quantization.candidates import Program, Proposal
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
"""What each technique quantizes, as far as a plan needs to know."""

OPEN_S = {"module": 3.5, "program": 0.6}
"""About how long a fresh process takes to open an artifact and warm up, by what its engine runs."""


def plan_report(
    request: QuantizeRequest, context: RunContext, loaded: LoadedModel, program: Program, proposal: Proposal
) -> EfficiencyReport:
    """The plan as a report: planned candidates, the layers they would touch, and an estimate of time and size."""
    launches = {"quick": 1, "standard": 5, "careful": 12}[request.timing]
    samples = loaded.evaluation.count + getattr(request.scheme, "calibration_samples", 0) + 256
    making = 2 * samples * _seconds_per_sample(loaded) + 3.0
    seconds = len(proposal.options) * making + launches * (OPEN_S["module"] + OPEN_S["program"] + 4.0)
    planned = [
        Candidate(
            name=option.name,
            scheme=option.scheme,
            runtime=option.runtime,
            size_bytes=_estimated_bytes(option.params, program),
            status="planned",
            why="would be made, screened, and measured in full if it is among the fastest; the size is an estimate",
        )
        for option in proposal.options
    ]
    touched = _touched(proposal, program)
    return EfficiencyReport(
        outcome="ok",
        summary=f"Plan only, nothing was done: {len(planned)} candidates would be tried on {len(touched)} layers, "
        f"in about {max(10, round(seconds, -1)):.0f} s{_training_words(request)}.",
        warnings=list(loaded.notes),
        next_steps=[plan_step(request)],
        verb="quantize",
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, None),
        changed=touched,
        candidates=[*planned, *proposal.passed_over],
        macs_check=loaded.macs.check if loaded.macs else None,
        lineage=list(loaded.lineage[:-1]),
        repeat=repeat_of("quantize", request),
    )


def _training_words(request: QuantizeRequest) -> str:
    if not isinstance(request.scheme, Qat):
        return ""
    epochs = request.scheme.epochs
    return f" after {epochs} epoch{'' if epochs == 1 else 's'} of training, whose time is not in it"


def _seconds_per_sample(loaded: LoadedModel) -> float:
    """One forward in this process: good enough for an estimate of the whole."""
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
    """Float bytes with the part that the technique covers at a quarter, a half, or at its bits and scales."""
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


def _touched(proposal: Proposal, program: Program) -> list[Change]:
    """Layers that at least one planned int8 candidate would quantize."""
    if program.path is None:
        return []
    found = find_layers(load(program.path, weights=False))
    changes: dict[str, Change] = {}
    for option in proposal.options:
        if isinstance(option.params, (Static, Qat, Dynamic, WeightOnly)):
            for layer in select_layers(found, option.params.targets, option.params.ignore):
                if layer.op in INT8_OPS[type(option.params)]:
                    what = f"planned: {option.scheme}"
                    after = f"int{option.params.num_bits}" if layer.op in ("MatMul", "Gemm") else "int8"
                    changes.setdefault(layer.path, Change(path=layer.path, what=what, before="float32", after=after))
    return list(changes.values())
