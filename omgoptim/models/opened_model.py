"""Opened artifacts as callables with the original's forward signature. No torch unless called with tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import ModelError
from omgoptim.hardware import usable_cores
from omgoptim.models.artifact import check_artifact, open_session
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import verify_outputs
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes import Session
from omgoptim.runtimes.signature import InputTensor, unflatten

_OF_A_MODULE = frozenset(
    {"parameters", "named_parameters", "buffers", "state_dict", "load_state_dict", "modules", "named_modules"}
    | {"children", "forward", "to", "cpu", "cuda", "half", "float", "device", "zero_grad", "requires_grad_"}
)
"""Methods of a module that an opened artifact does not have."""


class OpenedModel:
    """A callable artifact.

    Attributes:
        manifest: engine, precision, signature.
    """

    def __init__(self, manifest: Manifest, session: Session) -> None:
        self.manifest = manifest
        self._session = session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: inputs by position or by name, the batch first; outputs in the original's structure.

        Raises:
            ModelError: an input is missing, unknown, given twice, of another kind of number, or of another batch
                than the only one that the artifact takes.
        """
        names = self.manifest.signature.input_names
        if len(args) > len(names):
            raise ModelError(f"the model takes {len(names)} inputs, not {len(args)}", ", ".join(names))
        bound = dict(zip(names, args, strict=False))
        twice, unknown = bound.keys() & kwargs.keys(), kwargs.keys() - set(names)
        bound |= kwargs
        missing = [name for name in names if name not in bound]
        if twice or unknown or missing:
            problems = f"missing {missing}, unknown {sorted(unknown)}, given twice {sorted(twice)}"
            raise ModelError("the inputs do not fit the model", f"{problems}; it takes {', '.join(names)}")
        torch_in = any(_is_tensor(value) for value in bound.values())
        inputs = {tensor.name: _to_array(bound[tensor.name], tensor) for tensor in self.manifest.signature.inputs}
        self._refuse_other_batch(inputs)
        outputs = self._session.run(inputs)
        leaves = [_to_tensor(array) for array in outputs] if torch_in else outputs
        return unflatten(self.manifest.signature.outputs, leaves)

    def _refuse_other_batch(self, inputs: dict[str, NDArray[Any]]) -> None:
        """Refuse a batch size other than that of a program with a fixed batch."""
        size = self.manifest.signature.batch
        other = next((name for name, array in inputs.items() if size and array.shape[:1] != (size,)), None)
        if other is not None:
            raise ModelError(
                f"this artifact has the fixed batch size {size} and was called with {inputs[other].shape[0]} samples"
                if inputs[other].ndim
                else f"this artifact has the fixed batch size {size} and was called with a scalar",
                f"input '{other}'; the model's code fixes the batch size, so the program was exported with {size}",
                f"call it with {size} sample{'s' * (size != 1)} at a time; or use x.shape[0] instead of a fixed "
                "batch size in the model's code, and compress it again",
            )

    def eval(self) -> OpenedModel:
        """Return the model itself: it always runs in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> OpenedModel:
        """Raise: an engine's program has no gradients. `train(False)` is `eval()`.

        Raises:
            ModelError: training mode was asked for.
        """
        if mode:
            raise ModelError(
                "an opened artifact cannot be trained",
                f"it is a {self.manifest.runtime} program, which only supports inference",
                "train the original model; prune, factorize, distill and quantize with scheme qat include training",
            )
        return self

    def __getattr__(self, name: str) -> Any:
        """Raise an error that explains why a method of a module is missing."""
        if name in _OF_A_MODULE:
            raise AttributeError(
                f"an opened artifact has no '{name}': it is an inference engine's program, not a torch.nn.Module. "
                "Call it with inputs; model.manifest describes it"
            )
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __repr__(self) -> str:
        takes = ", ".join(f"{t.name}: {t.dtype}{list(t.shape)}" for t in self.manifest.signature.inputs)
        return f"<omgoptim model on {self.manifest.runtime}, {self.manifest.precision}: {takes}>"


def open_artifact(folder: Path, policy: PathPolicy, threads: int | None = None) -> OpenedModel:
    """Open an artifact folder; its files are checked against their sha256, its outputs against the recorded ones.

    Args:
        folder: the artifact.
        policy: the files and modules whose code its recipe may name, and trust in artifacts of other users.
        threads: of the engine; default: the machine's.

    Raises:
        ArtifactError: it is not an artifact, is damaged, its engine is missing, or its recipe runs code that was not
            allowed.
    """
    check_artifact(folder, policy)
    manifest, session = open_session(folder, threads or usable_cores(), policy)
    verify_outputs(folder, manifest, session)
    return OpenedModel(manifest, session)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _to_array(value: Any, takes: InputTensor) -> NDArray[Any]:
    """Convert to an array of the dtype that the engine takes; bfloat16 as float32."""
    if _is_tensor(value):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    array: NDArray[Any] = np.asarray(value)
    dtype = np.dtype("float32" if takes.dtype == "bfloat16" else takes.dtype)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ModelError(f"input '{takes.name}' has dtype {array.dtype}", f"the model takes {takes.dtype}")
    return array.astype(dtype, copy=False)


def _to_tensor(array: NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(np.asarray(array, order="C"))  # ascontiguousarray makes a row of a scalar
