"""Next steps: recommended calls, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from omgoptim.operations.final_measurement import Compression
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.candidates import runtimes_of
from omgoptim.operations.report_records import repeat_command
from omgoptim.operations.verdict import MAX_SAMPLES, ROUNDING
from omgoptim.reports import Candidate, EfficiencyReport, Layer, NextStep
from omgoptim.reports.measured import SMALLER
from omgoptim.requests import (
    ModelRequest,
    QuantizeRequest,
    Request,
    parse,
    technique_field,
    verb_of,
)
from omgoptim.requests.command import technique_arguments

REPEATABLE = ("bf16", "fp16", "fp32", "dynamic")
"""Schemes without training or search: a call by name repeats them identically."""

INTEGER_KERNELS = (
    *("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "LSTM"),
    *("MultiheadAttention", "Bilinear", "Conv", "Gemm", "MatMul", "ConvTranspose", "Embedding", "EmbeddingBag"),
)
"""Kinds of layers, and operators of programs, with integer kernels in an engine here."""

QUANTIZABLE_SHARE = 0.1
"""Minimum share of time in layers with int8 kernels for suggesting to quantize: less allows at most 1.11x."""


def step(tool: str, arguments: dict[str, Any], why: str) -> NextStep:
    """Return a next step with the command of its arguments."""
    return NextStep(tool=tool, arguments=arguments, command=repeat_command(parse(tool, arguments)), why=why)


def pick_step(run_id: str, name: str, why: str) -> NextStep:
    """Return the call that picks another finalist of a run, without new measurements."""
    arguments = {"action": "pick", "run_id": run_id, "name": name}
    return NextStep(tool="runs", arguments=arguments, command=f"omgoptim pick {run_id} {name}", why=why)


def common_arguments(request: ModelRequest) -> dict[str, Any]:
    """Return the given arguments on model, data and measuring, for another verb.

    Not `timing`: a call for a quick look is no reason to suggest one.
    """
    return {
        name: value
        for name, value in _explicit_arguments(request)
        if name in ModelRequest.model_fields and name != "timing"
    }


def engine_argument(runtime: str, scheme: str = "auto") -> dict[str, Any]:
    """Return a requested engine as an argument of `quantize`, if it runs the scheme's artifacts; not torch for auto."""
    request = parse("quantize", {"model": "m", "scheme": scheme})
    assert isinstance(request, QuantizeRequest)
    if runtime == "auto" or (scheme == "auto" and runtime.startswith("torch")):
        return {}
    runs = scheme == "auto" or runtime in runtimes_of(request.scheme)
    return {"runtime": runtime} if runs else {}


def result_arguments(request: ModelRequest, run_id: str) -> dict[str, Any]:
    """Return the arguments for another verb on a run's artifact: its data, metric and outputs."""
    of_the_original = ("model", "checkpoint", "weights", "model_kwargs")
    given = common_arguments(request)
    return {"model": run_id} | {name: value for name, value in given.items() if name not in of_the_original}


def same_arguments(request: ModelRequest) -> dict[str, Any]:
    """Return all given arguments, flat, to repeat a request with a change; without `output`, which may exist."""
    left_out = (technique_field(type(request)), "output", "plan")
    return {name: value for name, value in _explicit_arguments(request) if name not in left_out} | technique_arguments(
        request
    )


def _explicit_arguments(request: ModelRequest) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a request that are required or differ from their default."""
    for name, field in type(request).model_fields.items():
        value = getattr(request, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            yield name, value


def profile_steps(
    request: ModelRequest, loaded: LoadedModel, layers: Sequence[Layer], waits: float | None = None
) -> list[NextStep]:
    """Suggest steps after a profile: quantize, unless it cannot speed up the model.

    `waits` is the share of its time that the model waits instead of computing, if that is most of it.
    """
    if not loaded.precision.startswith("float32") or not _quantizable(layers):
        return []
    arguments = common_arguments(request) | engine_argument(str(getattr(request, "runtime", "auto")))
    costly = layers[0] if layers and layers[0].time_share else None
    share = f"{costly.path} ({costly.kind}) takes {costly.time_share:.0%} of the time; " if costly else ""
    why = f"{share}{_expected_gain(costly, waits)}"
    if not loaded.data.real:
        why += "; without data only dynamic quantization and half precision are possible"
    return [step("quantize", arguments, why)]


def _expected_gain(costly: Layer | None, waits: float | None) -> str:
    """Return a sentence on what quantization can gain, by where the model's time is spent."""
    if waits is not None:
        return f"quantization makes it smaller; {waits:.0%} of its time is waiting, which quantization does not shorten"
    if costly is None or costly.kind in INTEGER_KERNELS:
        return "quantization makes it smaller and faster at the lowest cost"
    if costly.macs:
        return f"quantization makes it smaller, but no engine here has integer kernels for {costly.kind}"
    return "quantization makes it smaller, and another engine may spend less time outside of the layers"


def _quantizable(layers: Sequence[Layer]) -> bool:
    """Return whether layers with weights take a relevant share of the time; True where it was not measured."""
    if not any(layer.macs for layer in layers):
        return True
    timed = [layer for layer in layers if layer.time_share is not None]
    able = sum(layer.time_share or 0 for layer in timed if layer.macs and layer.size_bytes)
    return not timed or able >= QUANTIZABLE_SHARE


def without_repeats(report: EfficiencyReport, request: Request) -> list[NextStep]:
    """Filter the next steps of a report by its results.

    Removed are the same call, duplicates, and schemes of `quantize` whose candidates failed the guard. Where the guard
    failed, a candidate that passed it comes first.
    """
    steps = [*_passing_candidate(report, request), *report.next_steps]
    made = [(report.verb, _without_output(request))]
    kept = []
    for one in steps:
        call = (one.tool, _without_output(parse(one.tool, one.arguments)))
        if call in made or _failed_the_guard(one, report, request):
            continue
        made.append(call)
        kept.append(one)
    return kept[:3]


def _without_output(request: Request) -> Request:
    """Return a request without its output folder, for comparison."""
    return request.model_copy(update={"output": None}) if "output" in type(request).model_fields else request


def _failed_the_guard(one: NextStep, report: EfficiencyReport, request: Request) -> bool:
    """Return whether a step requests a scheme whose candidates all failed the guard in this run."""
    scheme = one.arguments.get("scheme")
    if not isinstance(request, QuantizeRequest) or one.tool != "quantize" or scheme not in REPEATABLE:
        return False
    tried = [candidate for candidate in report.candidates if candidate.scheme == scheme]
    drops = [candidate.quality_drop for candidate in tried if candidate.quality_drop is not None]
    return bool(drops) and min(drops) > one.arguments.get("max_quality_drop", request.max_quality_drop) + ROUNDING


def _passing_candidate(report: EfficiencyReport, request: Request) -> list[NextStep]:
    """Return the call for the best candidate that passed the guard where the chosen one failed."""
    if report.outcome != "guard_failed" or not isinstance(request, QuantizeRequest):
        return []
    passed = [
        one
        for one in report.candidates
        if one.status in ("finalist", "dropped") and one.scheme in REPEATABLE and one.quality_drop is not None
        if one.quality_drop <= request.max_quality_drop + ROUNDING and _gained(one)
    ]
    if not passed:
        return []
    best = max(passed, key=lambda one: (one.speedup or 1.0) * (one.size_ratio or 1.0))
    arguments = common_arguments(request) | {"max_quality_drop": request.max_quality_drop}
    why = f"{best.name} passed the quality guard on the selection samples (drop {best.quality_drop:.4f})"
    return [step("quantize", arguments | {"scheme": best.scheme, "runtime": best.runtime}, why)]


def _gained(one: Candidate) -> bool:
    return (one.speedup or 0.0) > 1 or (one.size_ratio or 0.0) >= SMALLER


def plan_step(request: Compression) -> NextStep:
    """Suggest the planned run after a dry run."""
    output = {"output": request.output} if request.output else {}
    return step(verb_of(request), same_arguments(request) | output, "run what was planned")


def quantize_steps(
    request: QuantizeRequest, outcome: str, run_id: str, has_interval: bool, needed: int | None, loaded: LoadedModel
) -> list[NextStep]:
    """Suggest steps after a quantize run.

    `needed` is the number of evaluation samples that would decide the guard, if it is undecided.
    """
    real_data = loaded.data.real
    arguments = common_arguments(request)
    steps = []
    if outcome == "guard_failed":
        steps += _steps_to_lose_less(request, arguments | {"max_quality_drop": request.max_quality_drop}, loaded)
    if outcome == "no_gain":
        steps.append(step("profile", arguments, "shows the time by layer: small models are dominated by overhead"))
    if outcome == "ok" and not has_interval and request.timing == "quick":
        careful = same_arguments(request) | {"timing": "standard"}
        steps.append(step("quantize", careful, "a single launch gives no confidence interval; timing standard does"))
    if outcome == "ok" and not real_data:
        known = {key: value for key, value in arguments.items() if key != "inputs"} | {"data": "file.py:load"}
        known |= _goal(request) | engine_argument(request.runtime)
        steps.append(step("quantize", known, "with data, static quantization is possible and accuracy can be measured"))
    all_used = loaded.evaluation.count < request.samples
    if outcome == "ok" and real_data and needed and needed > request.samples and not all_used:
        larger = same_arguments(request) | {"samples": min(2 * needed, MAX_SAMPLES)}
        steps.append(step("quantize", larger, "more evaluation samples decide whether the quality guard passes"))
    if outcome == "ok" and request.runtime != "executorch":  # whose programs only `compare` takes
        why = "profile the artifact on the hardware it will run on"
        steps.append(step("profile", result_arguments(request, run_id), why))
    return steps[:3]


def _steps_to_lose_less(request: QuantizeRequest, arguments: dict[str, Any], loaded: LoadedModel) -> list[NextStep]:
    """Suggest steps after int8 failed the guard: better rounding, then QAT and bfloat16, or float32 on ExecuTorch."""
    steps = []
    scheme, on_device = request.scheme.scheme, request.runtime == "executorch"
    if scheme in ("auto", "static") and loaded.data.real:
        if request.effort != "best":
            best = same_arguments(request) | {"effort": "best"}
            steps.append(step("quantize", best, "AdaRound optimizes the rounding of each weight, which takes minutes"))
        if loaded.module is not None and not on_device:
            trained = arguments | _goal(request) | engine_argument(request.runtime, "qat") | {"scheme": "qat"}
            steps.append(step("quantize", trained, "quantization-aware training; needs training data and a few epochs"))
    if on_device and scheme != "fp32":
        plain = arguments | _goal(request) | {"scheme": "fp32", "runtime": request.runtime}
        steps.append(step("quantize", plain, "float32 on XNNPACK: the engine's speedup without quality loss"))
    elif not on_device and scheme != "bf16":
        half = arguments | _goal(request) | engine_argument(request.runtime, "bf16") | {"scheme": "bf16"}
        steps.append(step("quantize", half, "bfloat16 loses far less quality than int8 at half the float32 size"))
    return steps


def _goal(request: QuantizeRequest) -> dict[str, Any]:
    """Return the given arguments on which candidate to choose."""
    fields = type(request).model_fields
    names = ("max_quality_drop", "prefer")
    return {name: getattr(request, name) for name in names if getattr(request, name) != fields[name].default}
