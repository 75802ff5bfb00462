"""Registry of the engines that run models, one file each.

A new engine is one file with an `ENGINE` record and one line here. Nothing heavy is imported before an engine is
asked for something.
"""

from __future__ import annotations

from omgoptim.errors import RequestError, did_you_mean
from omgoptim.runtimes import executorch, onnxruntime, openvino, torch_engines
from omgoptim.runtimes.engine import Engine, Session, SessionSettings

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        *(torch_engines.ENGINE, torch_engines.COMPILED, onnxruntime.ENGINE, onnxruntime.TENSORRT),
        *(openvino.ENGINE, executorch.ENGINE),
    )
}

__all__ = ["ENGINES", "Engine", "Session", "SessionSettings", "engine_named"]


def engine_named(name: str) -> Engine:
    """Return the engine of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in ENGINES:
        raise RequestError(f"'{name}' is not a runtime", did_you_mean(name, ENGINES))
    return ENGINES[name]
