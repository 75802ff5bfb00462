"""Errors for a quantization that changes no layer, with a working call as the fix."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.errors import NoLayerChanged, OmgoptimError, TechniqueError, call
from omgoptim.operations.context import is_live
from omgoptim.operations.next_steps import engine_argument, same_arguments, step
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.requests.quantize import Auto
from omgoptim.techniques.registry import technique_of

WITHOUT_DATA = "bf16"
"""Scheme that works for any model without data."""


def no_candidate_error(failed: Sequence[tuple[str, OmgoptimError]], request: QuantizeRequest) -> OmgoptimError:
    """Return one error for candidates that all failed: the first error where all have the same cause.

    Args:
        failed: each candidate's name and error.
        request: of the run, from which the fix is written.
    """
    errors = [error for _, error in failed]
    if len({error.what for error in errors}) == 1 or all(isinstance(error, NoLayerChanged) for error in errors):
        return with_suggested_call(errors[0], request)
    reasons = "; ".join(f"{name}: {error.what}" for name, error in failed)
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
