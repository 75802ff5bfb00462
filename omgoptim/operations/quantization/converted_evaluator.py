"""Evaluator of the quantized program that a module converts to, run after each epoch of QAT."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from omgoptim.models.manifest import PROGRAM
from omgoptim.models.samples import as_tensors
from omgoptim.requests.quantize import Qat
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.techniques.quantize._ptq.qat_state import Peaks, QatState, write_qat_state
from omgoptim.techniques.registry import ProgramRun, apply_to_program
from omgoptim.training.evaluator import COLLAPSED, Evaluator
from omgoptim.training.fake_quantization import FakeQuantized


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedEvaluator(Evaluator):
    """Evaluator that exports and quantizes a module and runs the program in ONNX Runtime on the CPU."""

    params: Qat
    untrained: Path
    """Program of the module before training."""
    peaks: Peaks
    """Peaks that cross-layer equalization scales channels by."""
    calibration: Sequence[Any]
    """Batches for calibration."""
    example: dict[str, Any]
    """Two samples, for the export."""
    scratch: Path
    """An existing folder."""
    threads: int = 1
    seed: int = 0

    def score(self, module: nn.Module) -> float:
        """Return the metric of the converted program; `COLLAPSED` where the module's outputs are not finite.

        Raises:
            OmgoptimError: it cannot be converted, or as `Evaluator.score`.
        """
        plain = plain_of(module)
        if not self.usable(self.outputs_of(plain)):  # no range could be calibrated: the training failed, not the run
            return COLLAPSED
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            return self.value_of(self._converted(module, plain, Path(folder)))

    def _converted(self, module: nn.Module, plain: nn.Module, folder: Path) -> list[Any]:
        """Return the outputs of the converted program."""
        from omgoptim.runtimes.export import export_onnx

        exported, converted = self.untrained, folder / PROGRAM
        if was_trained(module):
            exported = folder / "float.onnx"
            export_onnx(plain, as_tensors(self.example, self.signature.dtypes), self.signature, exported)
            write_learned_state(module, exported, self.peaks)
        run = ProgramRun(self.calibration, folder, self.seed, self.threads)
        apply_to_program(exported, converted, self.params, run)
        session = ENGINES["onnxruntime"].open(converted, self.signature, SessionSettings(self.threads))
        return [session.run(batch) for batch in self.samples.batches]


def was_trained(module: nn.Module) -> bool:
    """Return whether training has changed a module's weights."""
    return not isinstance(module, FakeQuantized) or int(module.steps_done) > 0


def write_learned_state(module: nn.Module, program: Path, peaks: Peaks) -> None:
    """Store the learned ranges and scales of a trained module in its program."""
    if isinstance(module, FakeQuantized):
        write_qat_state(program, QatState(module.ranges(), peaks))


def plain_of(module: nn.Module) -> nn.Module:
    """Return a copy of the wrapped module on the CPU in eval mode."""
    inside = module.module if isinstance(module, FakeQuantized) else module
    return copy.deepcopy(inside).cpu().eval()
