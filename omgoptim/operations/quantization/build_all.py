"""Build all candidates of a quantize run; where none can be built, one error with a working call as its fix."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omgoptim.errors import NoLayerChanged, OmgoptimError, TechniqueError, call
from omgoptim.models.manifest import Manifest
from omgoptim.operations.context import is_live
from omgoptim.operations.float_program import Program
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import engine_argument, same_arguments, step
from omgoptim.operations.quantization.build_candidates import BuiltCandidate, CandidateBuilder
from omgoptim.operations.quantization.candidates import CandidatePlan, CandidateSpec
from omgoptim.operations.quantization.qat import TRAINED_AT
from omgoptim.operations.quantization.screening import SPAN, CandidateResult, live_candidate
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.requests.quantize import Auto, Fp32, Qat
from omgoptim.techniques.registry import technique_of

BUILD_LIMIT_S = 300.0
"""Time limit in seconds for building one of several candidates, except with effort best, so that
a slow one leaves time for the others."""

WITHOUT_DATA = "bf16"
"""Scheme that works for any model without data."""


def build_all(request: QuantizeRequest, builder: CandidateBuilder, plan: CandidatePlan) -> list[CandidateResult]:
    """Build all candidates, and float32 references on their engines.

    Raises:
        OmgoptimError: no candidate could be built.
    """
    results: list[CandidateResult] = []
    twins: dict[str, BuiltCandidate] = {}
    count = len(plan.specs)
    start = TRAINED_AT if isinstance(request.scheme, Qat) else 0.1
    for index, spec in enumerate(plan.specs):
        doing = build_progress(spec.name, index, count)
        builder.context.progress(doing, start + (SPAN[0] - start) * index / count)
        key = "" if spec.on_module else spec.params.model_dump_json()
        several = count - index > 1 or any(result.built.folder for result in results)
        limit_s = BUILD_LIMIT_S if several and request.effort != "best" else math.inf
        built = builder.build(spec, twins.get(key), doing=doing, limit_s=limit_s)
        if key and built.folder:
            twins.setdefault(key, built)
        results.append(CandidateResult(built, error=built.error))
        builder.context.publish(live_candidate(results[-1]))
    if all(result.error for result in results):
        raise no_candidate_error([(a.built.spec, a.error) for a in results if a.error], request)
    for spec in _references(plan, builder.loaded, builder.program):
        key = spec.params.model_dump_json()
        built = builder.build(spec, twins.get(key))
        if built.folder:
            twins.setdefault(key, built)
            results.append(CandidateResult(built, reference=True))
    return results


def build_progress(name: str, index: int, count: int) -> str:
    """Return the progress message while a candidate is built."""
    return f"building candidate {index + 1} of {count}, {name}" if count > 1 else f"building {name}"


def _references(plan: CandidatePlan, loaded: LoadedModel, program: Program) -> list[CandidateSpec]:
    """Return float32 specs for the engines of program candidates, where float32 is not a candidate or the original."""
    original = Manifest.read(loaded.baseline)
    engines = {o.runtime for o in plan.specs if o.is_lowered or (program.path and not o.on_module)}
    engines -= {spec.runtime for spec in plan.specs if isinstance(spec.params, Fp32)}
    engines -= {original.runtime} if original.precision == "float32" else set()
    return [CandidateSpec(Fp32(), runtime) for runtime in sorted(engines)]


def no_candidate_error(
    failed: Sequence[tuple[CandidateSpec, OmgoptimError]], request: QuantizeRequest
) -> OmgoptimError:
    """Return one error for candidates that all failed: the first error where all have the same cause.

    That is where none would change a layer, or where one technique failed with the same kind of error on each engine.

    Args:
        failed: each candidate and its error.
        request: of the run, from which the fix is written.
    """
    errors = [error for _, error in failed]
    one_technique = all(spec.params == failed[0][0].params for spec, _ in failed)
    alike = one_technique and len({type(error) for error in errors}) == 1
    if alike or all(isinstance(error, NoLayerChanged) for error in errors):
        return with_suggested_call(errors[0], request)
    reasons = "; ".join(f"{spec.name}: {error.what}" for spec, error in failed)
    return TechniqueError("no candidate could be built", reasons, errors[0].fix)


def with_suggested_call(error: OmgoptimError, request: QuantizeRequest) -> OmgoptimError:
    """Add a ready call to the fix of a `NoLayerChanged` error; return any other error unchanged.

    The technique names the schemes that help, best first; the request names the model. A glob that matches no layer
    is left out of the call.
    """
    if not isinstance(error, NoLayerChanged):
        return error
    usable = [name for name in error.schemes if request.data is not None or not _needs_data(name)]
    globs = [name for name in ("targets", "ignore") if getattr(request.scheme, name, [])]
    if error.schemes:
        scheme = {"scheme": usable[0] if usable else WITHOUT_DATA}
    elif globs:
        scheme = {"scheme": request.scheme.scheme}
    else:
        return error
    common = same_arguments(request.model_copy(update={"scheme": Auto()}))
    arguments = {name: value for name, value in common.items() if name != "runtime"} | scheme
    arguments |= engine_argument(request.runtime, scheme["scheme"])
    live = any(is_live(value) for value in arguments.values())
    ready = step("quantize", arguments, "").command if live else call("quantize", arguments)
    return TechniqueError(error.what, error.why, f"{error.fix}: {ready}" if error.fix else ready)


def _needs_data(scheme: str) -> bool:
    """Return whether a scheme needs data; True for an unknown scheme, which is not suggested then."""
    try:
        request = parse("quantize", {"model": "m", "scheme": scheme})
    except OmgoptimError:
        return True
    return not isinstance(request, QuantizeRequest) or technique_of(request.scheme).needs_data
