"""The trials of a search: proposed, measured, trained under successive halving, the best trained to the end."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from omgoptim.architecture_search.drive import Driven, Plan, TrialLoop, drive, drive_conditional
from omgoptim.architecture_search.propose import DEFAULT, Load, Proposer, Rule, propose, propose_random
from omgoptim.architecture_search.runner import WEIGHTS, TrialFunctions, finalists, fitting, run_trial
from omgoptim.architecture_search.space import Configuration
from omgoptim.architecture_search.trials import TrialFolders, TrialResult, TrialSpec
from omgoptim.errors import TechniqueError
from omgoptim.executors import Executor
from omgoptim.models.manifest import Manifest
from omgoptim.operations.architecture_search.costs import Costs
from omgoptim.operations.architecture_search.predictions import Predictions
from omgoptim.operations.architecture_search.spaces import Searched
from omgoptim.operations.architecture_search.tasks import TaskRunner
from omgoptim.operations.compression_job import Job
from omgoptim.operations.distillation.student_training import PRETRAINED_LEARNING_RATE
from omgoptim.operations.execution import weights_hash
from omgoptim.reports import Candidate
from omgoptim.requests import SearchRequest
from omgoptim.training.config import TrainingConfig, config_for_data
from omgoptim.training.distillation import DistillationLoss

_LIVE_STATUS = {"rejected": "skipped", "failed": "failed"}
"""Status of trials that have ended early; the others are undecided until the end."""

FINALS = 3
"""Trials that are trained to the end."""

FINAL_SHARE = 0.25
"""Share of a time budget that the final trainings and measurements have."""


@dataclass(frozen=True, slots=True)
class Found:
    """Result of the search."""

    driven: Driven
    specs: dict[int, TrialSpec]
    results: dict[int, TrialResult]
    """Results of every trial; that of the final training where there was one."""
    finals: list[int]
    """Numbers of the trials that were trained to the end, by their quality on the selection samples."""
    artifacts: dict[int, Path]
    """Artifacts of the finals, by number."""


@dataclass(frozen=True, slots=True)
class Trials:
    """Runs searches of one space: the rule's, and the control's."""

    job: Job[SearchRequest]
    searched: Searched
    costs: Costs
    predictions: Predictions | None
    teacher: nn.Module | None
    began: float
    rule: Rule = DEFAULT
    executor: Executor | None = None
    """Trains networks elsewhere; None: here, one after the other."""

    def run(self, folder: Path, way: Proposer, span: tuple[float, float], finals: int = FINALS) -> Found:
        """Search in a folder, or go on there, and train the best to the end.

        Raises:
            TechniqueError: every trial failed, or every network is over the limits.
            RequestError: the time was over before the first trial.
        """
        folder.mkdir(parents=True, exist_ok=True)
        folders, ends = TrialFolders(folder / "trials"), TrialFolders(folder / "finals")
        ends.clear()
        steps = self._steps()
        first, end = span
        middle = end - 0.25 * (end - first)

        def trial(spec: TrialSpec, into: Path) -> TrialResult:
            return run_trial(steps, folders, spec, into)

        shown: set[int] = set()

        def progress(stage: str, done: float | None) -> None:
            self._publish(folders, shown, "trial" if way is propose else "random trial")
            self.job.context.progress(stage, None if done is None else first + (middle - first) * done)

        tasks = self._tasks(steps)
        if tasks is not None:
            tasks.conclude_left(folders)
        start = None if tasks is None else partial(tasks.start, folders)
        request = self.job.request
        data = str(request.data)
        plan = Plan(request.trials, request.seed, request.model, data, request.whole_epochs, request.in_flight)
        driven = self._drive(TrialLoop(trial, plan, folder, progress, self._more, start), folders, way)
        self.job.context.progress(f"training the best {finals} to the end", middle)
        shared = tasks is not None and tasks.executor is not None
        best = tasks.finalists(folders, ends, finals) if tasks and shared else finalists(steps, folders, ends, finals)
        results = folders.results()
        artifacts: dict[int, Path] = {}
        specs = {number: folders.spec(number) for number in results}
        for spec, result in best:
            results[spec.number] = result
            for place in (ends.path(spec.number), folders.path(spec.number)):
                if (place / "artifact").is_dir() and result.outcome == "trained":
                    artifacts.setdefault(spec.number, place / "artifact")
        if not artifacts:
            reasons = [result.reason for _, result in best if result.reason]
            why = reasons[0] if reasons else "no trial was trained to the end"
            raise TechniqueError("none of the best trials could be trained to the end", why)
        order = sorted(artifacts, key=lambda number: -results[number].rungs[-1])
        return Found(driven, specs, results, order, artifacts)

    def _drive(self, loop: TrialLoop, folders: TrialFolders, way: Proposer) -> Driven:
        predictions, product = self.predictions, self.searched.product
        if product is None or predictions is None:
            assert self.searched.parameters is not None  # an automatic space is a product
            return drive_conditional(self.searched.parameters, None, loop)

        def loads(results: dict[int, TrialResult]) -> Load:
            known: dict[int, Configuration] = {number: folders.spec(number).configuration for number in results}
            return predictions.loads(results, known)

        nearest = min(predictions.measured_loads, default=None)
        return drive(product, loads, loop, way, self.rule, nearest)

    def _publish(self, folders: TrialFolders, shown: set[int], prefix: str) -> None:
        """Show the trials that have ended to those who watch the run."""
        for number, result in folders.results().items():
            if number in shown:
                continue
            shown.add(number)
            status = _LIVE_STATUS.get(result.outcome, "planned")
            name = f"{prefix} {number}"
            spec = folders.spec(number)
            self.job.context.publish(trial_record(self.job, self.costs, name, status, spec, result))

    def _more(self) -> bool:
        minutes = self.job.request.budget_minutes
        return minutes is None or time.monotonic() - self.began < (1 - FINAL_SHARE) * 60 * minutes

    def _tasks(self, steps: TrialFunctions) -> TaskRunner | None:
        if self.executor is None and self.job.request.in_flight == 1:
            return None
        return TaskRunner(self.executor, self.job, steps, "" if self.teacher is None else weights_hash(self.teacher))

    def _steps(self) -> TrialFunctions:
        predictions, limit = self.predictions, self.costs.limits.latency_ms
        return TrialFunctions(
            self.searched.build,
            self.costs.measure,
            self.training(),
            predictions.latency if predictions is not None else None,
            limit,
        )

    def training(self) -> Callable[[nn.Module, int, int, Path], float]:
        """Return the training of a rung: the user's settings, with the model as teacher where there is one."""
        request, datasets = self.job.request, self.job.datasets

        def train(module: nn.Module, rung: int, epochs: int, checkpoints: Path) -> float:
            def plan(count: int) -> TrainingConfig:
                config = TrainingConfig.of(request, count, self.job.loaded.device, request.seed)
                normalized = any(isinstance(layer, nn.LayerNorm) for layer in module.modules())
                adaptive = request.learning_rate is None and request.optimizer in ("adam", "adamw")
                inherits = self.searched.parameters is None
                config = (
                    replace(config, learning_rate=PRETRAINED_LEARNING_RATE)
                    if normalized and adaptive and inherits
                    else config
                )
                return config_for_data(config, request, datasets.batches)

            distillation = DistillationLoss(request.temperature, request.alpha)
            fits = fitting(datasets.batches, datasets.loss, plan, datasets.evaluator, self.teacher, distillation)
            quality = fits(module, rung, epochs, checkpoints)
            if not math.isfinite(quality):
                raise TechniqueError(
                    "the network gives no usable numbers",
                    f"its {datasets.evaluator.metric.name} after training is {quality}",
                )
            return quality

        return train


def trial_record(
    job: Job[SearchRequest], costs: Costs, name: str, status: str, spec: TrialSpec, result: TrialResult
) -> Candidate:
    """Return a trial as a candidate of the report."""
    baseline = Manifest.read(costs.baseline).size_bytes
    quality = result.rungs[-1] if result.rungs else None
    words = ", ".join(f"{knob} {option}" for knob, option in spec.configuration.items() if option != "keep")
    times = [f"predicted {result.predicted_ms:.3g} ms"] if result.predicted_ms else []
    times += [f"measured {result.measured_ms:.3g} ms"] if result.measured_ms else []
    return Candidate.model_validate(
        {
            "name": name,
            "scheme": "search",
            "runtime": job.runtime,
            "size_bytes": result.size_bytes,
            "size_ratio": baseline / result.size_bytes if result.size_bytes else None,
            "speedup": costs.baseline_ms / result.measured_ms if result.measured_ms else None,
            "quality": quality,
            "quality_drop": None if quality is None else job.datasets.evaluator.original - quality,
            "status": status,
            "why": "; ".join(part for part in (result.reason, words or "all kept", ", ".join(times)) if part),
        }
    )


def search_both(trials: Trials, folder: Path) -> tuple[Found, Found | None]:
    """Search by the rule; and at random, where a control was asked for."""
    control = trials.job.request.control == "random" and trials.searched.product is not None
    middle = 0.5 if control else 0.8
    found = trials.run(folder, propose, (0.25, middle))
    if not control:
        return found, None
    return found, trials.run(folder / "control", propose_random, (middle, 0.8))


def train_reference(trials: Trials, module: nn.Module, folder: Path) -> nn.Module:
    """Train a copy of a space's largest network as long as a trial: without a model it is what others are compared to.

    A search that goes on reads the weights.
    """
    from safetensors.torch import load_model, save_model

    module, file = copy.deepcopy(module), folder / WEIGHTS
    if file.exists():
        load_model(module, str(file))
        return module.eval()
    trials.job.context.progress("training the largest network of the space", 0.1)
    trials.training()(module, 0, trials.job.request.whole_epochs, folder / "checkpoints")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    scratch = file.with_suffix(".partial")
    save_model(module, str(scratch))
    scratch.replace(file)
    return module.eval()


def remove_weights(folder: Path) -> None:
    """Remove the files of a finished search that only resuming needs: weights and artifacts of trials."""
    kinds = (
        *folder.rglob(WEIGHTS),
        *folder.glob("**/trials/*/artifact"),
        *folder.glob("**/finals/*/artifact"),
    )
    for place in kinds:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
