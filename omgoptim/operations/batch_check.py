"""Check whether the output for a sample depends on its batch, with the known cause."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from omgoptim.measure.validity_checks import batch_dependence
from omgoptim.models.samples import Samples
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.signature import Signature


def batch_dependence_of(
    module: nn.Module | None, program: Path | None, signature: Signature, evaluation: Samples, threads: int
) -> str | None:
    """Describe how the output for a sample depends on its batch; None where it does not or is unknown.

    Args:
        module: the model as a module, or None; preferred.
        program: the model as an ONNX file, or None.
        signature: inputs and outputs of the model.
        evaluation: samples to run alone and together.
        threads: of the engine.
    """
    if module is None:
        if program is None:
            return None
        session = ENGINES["onnxruntime"].open(program, signature, SessionSettings(threads=threads))
        return batch_dependence(session.run, evaluation)
    session = ENGINES["torch_eager"].open(module, signature, SessionSettings(threads=threads))
    own = [
        path for path, layer in module.named_modules() if isinstance(layer, _BatchNorm) and layer.running_mean is None
    ]
    cause = f"batch normalization without running statistics ({', '.join(own[:3])})" if own else ""
    coarse = any(
        tensor.is_floating_point() and tensor.element_size() < 4
        for tensors in (module.parameters(), module.buffers())
        for tensor in tensors
    )
    return batch_dependence(session.run, evaluation, cause, coarse)
