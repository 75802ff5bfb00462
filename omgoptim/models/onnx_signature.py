"""Signature of an ONNX file."""

from __future__ import annotations

from pathlib import Path

from omgoptim.errors import ModelError
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.engine import engine_message
from omgoptim.runtimes.external_data import external_data
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature


def declared_signature(program: Path) -> Signature:
    """Return the signature that an ONNX file declares: dimensions without a fixed size are dynamic.

    Raises:
        ModelError: ONNX Runtime cannot open it, its weights lie outside its folder, or its batch is
            fixed at another number than 1.
    """
    import onnxruntime

    reason = ENGINES["onnxruntime"].missing("cpu")
    if reason:
        raise ModelError(f"{program.name} cannot be opened", reason)
    try:
        external_data(program)
        session = onnxruntime.InferenceSession(str(program), providers=["CPUExecutionProvider"])
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{program.name} cannot be opened", engine_message(error)) from error
    kinds = {"float": "float32", "double": "float64"}
    inputs = []
    for tensor in session.get_inputs():
        kind = tensor.type.removeprefix("tensor(").removesuffix(")")
        if not tensor.shape or (isinstance(tensor.shape[0], int) and tensor.shape[0] != 1):
            raise ModelError(
                f"{program.name} takes no batch of any size",
                f"the first dimension of input '{tensor.name}' is {tensor.shape[0] if tensor.shape else 'missing'}; "
                "latency is measured at batch 1, throughput and quality at others",
                "export a dynamic batch: torch.onnx.export(…, dynamic_shapes=({0: torch.export.Dim('batch')},))",
            )
        shape = [size if isinstance(size, int) else f"{tensor.name}_{axis}" for axis, size in enumerate(tensor.shape)]
        inputs.append(
            InputTensor(tensor.name, kinds.get(kind, kind), (1 if tensor.shape[0] == 1 else BATCH, *shape[1:]), False)
        )
    names = [tensor.name for tensor in session.get_outputs()]
    return Signature(tuple(inputs), "tensor" if len(names) == 1 else {"dict": dict.fromkeys(names, "tensor")})
