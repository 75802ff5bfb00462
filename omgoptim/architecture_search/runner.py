"""Run a trial: measure the untrained network, then train it under successive halving.

A network that is predicted or measured to be over a limit is rejected before any training. Each rung is a training of
its own, whose learning rate falls to its end, so that qualities at one rung compare.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import nn

from omgoptim.architecture_search.halving import at_rung, best_of, goes_on, rung_epochs
from omgoptim.architecture_search.space import Configuration
from omgoptim.architecture_search.trials import TrialFolders, TrialResult, TrialSpec
from omgoptim.errors import ArtifactError
from omgoptim.training.batches import Batches
from omgoptim.training.config import TrainingConfig
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.evaluator import Evaluator
from omgoptim.training.loop import Objective, Trainer, TrainingRound
from omgoptim.training.losses import Loss

WEIGHTS = "weights.safetensors"

Train = Callable[[nn.Module, int, int, Path], float]
"""`train(module, rung, epochs, checkpoints)`: train in place, return the quality on the selection samples."""


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """Measured cost of a saved network on the device."""

    latency_ms: float | None = None
    size_bytes: int | None = None
    loads: Mapping[str, float] = field(default_factory=dict)
    """Measured cost over its limit, by constraint."""


@dataclass(frozen=True, slots=True)
class TrialFunctions:
    """Functions of a trial; an OmgoptimError of one fails only that trial."""

    build: Callable[[Configuration], nn.Module]
    """Build a new module, with inherited weights where it has a parent."""
    measure: Callable[[nn.Module, Path], MeasuredCost]
    """`measure(module, folder)`: export into the folder in the final engine and precision, and measure that."""
    train: Train
    predict: Callable[[Configuration], float] | None = None
    """Predicted latency in ms."""
    limit_ms: float | None = None
    """Limit of the predicted latency in ms; measured networks are compared by their loads."""
    tolerance: float = 0.15
    """Tolerance of the prediction's limit; within it the measurement decides."""


def run_trial(steps: TrialFunctions, folders: TrialFolders, spec: TrialSpec, folder: Path) -> TrialResult:
    """Run a trial; a function of its spec and of the trials that are finished.

    Args:
        steps: functions that build, measure and train a network.
        folders: the finished trials, whose qualities decide at each rung.
        spec: number and configuration of the trial.
        folder: of the trial, incomplete; the weights stay in it.

    Raises:
        OmgoptimError: as the steps do.
    """
    screened = screen(steps, spec, folder)
    if isinstance(screened, TrialResult):
        return screened
    module = screened.module
    qualities = climb(steps.train, module, spec, folder / "checkpoints", list(folders.histories().values()))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    save_weights(module, folder / WEIGHTS)
    return conclude(spec, qualities, screened.untrained, screened.predicted)


@dataclass(frozen=True, slots=True)
class Screened:
    """An untrained network within the limits."""

    module: nn.Module
    predicted: float | None
    """Latency in ms."""
    untrained: MeasuredCost


def screen(steps: TrialFunctions, spec: TrialSpec, folder: Path) -> Screened | TrialResult:
    """Build a network, predict and measure it untrained; return the result of a rejected one.

    Raises:
        OmgoptimError: as the steps do.
    """
    module, predicted = steps.build(spec.configuration), _predicted(steps, spec.configuration)
    if predicted is not None and steps.limit_ms is not None and predicted > steps.limit_ms * (1 + steps.tolerance):
        loads = {"latency": predicted / steps.limit_ms}
        return TrialResult(outcome="rejected", loads=loads, predicted_ms=predicted, reason="predicted to be too slow")
    untrained = steps.measure(copy.deepcopy(module), folder / "untrained")
    if max(untrained.loads.values(), default=0.0) > 1.0:
        return _result("rejected", (), untrained, predicted, "measured over a limit before training")
    return Screened(module, predicted, untrained)


def conclude(
    spec: TrialSpec, qualities: tuple[float, ...], untrained: MeasuredCost, predicted: float | None
) -> TrialResult:
    """Return the result of a training, with the cost that the network had before it."""
    if len(qualities) < len(rung_epochs(spec.epochs)):
        return _result("stopped", qualities, untrained, predicted, "not among the best third at its rung")
    return _result("trained", qualities, untrained, predicted, "")


def climb(
    train: Train,
    module: nn.Module,
    spec: TrialSpec,
    checkpoints: Path,
    others: Sequence[Sequence[float]] | None,
    before: Sequence[float] = (),
) -> tuple[float, ...]:
    """Train a module in place rung by rung, while it is among the best; return its quality at each rung.

    Args:
        train: of one rung.
        module: in its state after the rungs of `before`.
        spec: of the trial.
        checkpoints: folder of the training's.
        others: qualities at each rung of the trials that it is compared with; None to train it to the end.
        before: its qualities at the completed rungs.
    """
    qualities = list(before)
    for rung, epochs in list(enumerate(rung_epochs(spec.epochs)))[len(qualities) :]:
        qualities.append(train(module, rung, epochs, checkpoints))
        if others is not None and not goes_on(qualities[-1], at_rung(others, rung)):
            break
    return tuple(qualities)


def unfinished(folders: TrialFolders, count: int = 3) -> list[tuple[TrialSpec, TrialResult]]:
    """Return the trials that are to be trained to the end, the most promising first; some are already."""
    histories = folders.histories()
    numbers = list(histories)
    chosen = [numbers[index] for index in best_of(list(histories.values()), count)]
    return [(folders.spec(number), found) for number in chosen if (found := folders.result(number)) is not None]


def finalists(
    steps: TrialFunctions, folders: TrialFolders, finals: TrialFolders, count: int = 3
) -> list[tuple[TrialSpec, TrialResult]]:
    """Train the best trials to the end and measure them, the most promising first.

    What is finished in `finals` is not done again.

    Raises:
        ArtifactError: the weights of a trial are gone or not its own.
        OmgoptimError: as the steps do.
    """
    found = []
    for spec, before in unfinished(folders, count):
        weights = folders.path(spec.number) / WEIGHTS
        found.append((spec, finals.run(spec, partial(finished, steps, before=before, weights=weights))))
    return found


def fitting(
    batches: Batches,
    loss: Loss | None,
    plan: Callable[[int], TrainingConfig],
    evaluator: Evaluator,
    teacher: nn.Module | None,
    distillation: DistillationLoss | None = None,
) -> Train:
    """Return a `train` step on the training loop, with the original as the teacher where there is one.

    Args:
        batches: of the train split.
        loss: on the targets; None to learn from the teacher alone.
        plan: of so many epochs.
        evaluator: of the selection samples.
        teacher: the original; None without.
        distillation: the distance to the teacher.
    """
    objective = Objective(loss, teacher, distillation if teacher is not None else None)

    def train(module: nn.Module, rung: int, epochs: int, checkpoints: Path) -> float:
        checkpoints.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(module, batches, objective, plan(epochs), evaluator)
        fitted = trainer.fit(TrainingRound(rung + 1, checkpoints))
        return float("nan") if fitted.quality is None else fitted.quality

    return train


def finished(steps: TrialFunctions, spec: TrialSpec, folder: Path, before: TrialResult, weights: Path) -> TrialResult:
    """Train a trial from its weights to the end, unless it was, and measure the result."""
    module = steps.build(spec.configuration)
    load_weights(module, weights)
    qualities = climb(steps.train, module, spec, folder / "checkpoints", None, before.rungs)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    save_weights(module, folder / WEIGHTS)
    cost = steps.measure(module, folder / "artifact")
    return _result("trained", qualities, cost, before.predicted_ms, "")


def _result(
    outcome: str, rungs: tuple[float, ...], cost: MeasuredCost, predicted: float | None, reason: str
) -> TrialResult:
    return TrialResult.model_validate(
        {
            "outcome": outcome,
            "rungs": rungs,
            "loads": dict(cost.loads),
            "predicted_ms": predicted,
            "measured_ms": cost.latency_ms,
            "size_bytes": cost.size_bytes,
            "reason": reason,
        }
    )


def _predicted(steps: TrialFunctions, configuration: Configuration) -> float | None:
    return None if steps.predict is None else steps.predict(configuration)


def save_weights(module: nn.Module, file: Path) -> None:
    """Save the weights of a module."""
    from safetensors.torch import save_model

    save_model(module, str(file))


def load_weights(module: nn.Module, file: Path) -> None:
    """Load the weights of a trial into a module of its configuration.

    Raises:
        ArtifactError: they are gone, or another module's.
    """
    from safetensors.torch import load_model

    try:
        load_model(module, str(file))
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"the weights of trial {file.parent.name} cannot be loaded", str(error)[:300]) from error
