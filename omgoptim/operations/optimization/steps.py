"""The steps of an optimize run: ordinary runs on selection data, kept in a ledger, never done twice."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import omgoptim
from omgoptim.errors import OmgoptimError, RunError, SetupError
from omgoptim.models.report_file import read_report
from omgoptim.operations.context import RunContext, StepRun
from omgoptim.operations.ledger import Amounts, Ledger, LedgerEntry, key_of
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.optimization.points import StepResult, pareto_points, product
from omgoptim.operations.optimization.selection_data import selection_as_evaluation
from omgoptim.operations.report_records import VERSIONS
from omgoptim.operations.verdict import with_margin
from omgoptim.reports import Alternative, EfficiencyReport, Step
from omgoptim.requests import ModelRequest, OptimizeRequest, Request, parse

PASSING = (SetupError, RunError)
"""Errors of the machine, such as a full disk: a step that failed by one is taken again when the run is resumed."""

PARALLEL, SECONDS_FILE = "parallel", "seconds"
"""Folder, in a run's checkpoints, of the steps that workers trained, by key; and the file of a step's seconds there."""

PLACE = ("project", "python", "timing")
"""Arguments of a request that decide nothing of a step's result."""

OF_THE_ORIGINAL = ("checkpoint", "weights", "model_kwargs")
"""Arguments that build the original: an artifact needs none of them."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step that may be taken."""

    name: str
    """Name in the report."""
    verb: str
    arguments: dict[str, Any]
    """Arguments of the verb, beside those that every verb shares."""
    parent: StepResult | None = None
    """Parent point whose artifact the step starts from; None for the original."""
    span: tuple[float, float] = (0.0, 1.0)
    """Fraction of the whole run that it takes."""
    expected_speedup: float | None = None
    """For the report."""
    expected_seconds: float = 0.0
    """A step that takes longer than what is left is not begun."""


@dataclass(slots=True)
class Steps:
    """Take steps within a time budget, and keep their results.

    Steps that were read from the ledger count with their seconds, so a resumed run decides as an uninterrupted one.
    """

    request: OptimizeRequest
    context: RunContext
    live: Live
    ledger: Ledger
    budget_s: float
    """Seconds that all steps may take together."""
    model: str = ""
    """Identity of the original."""
    data: str = ""
    """Identity of the data."""
    clock: Callable[[], float] = time.monotonic
    taken: list[StepResult] = field(default_factory=list)
    without_result: list[Step] = field(default_factory=list)
    """Steps that failed, and those that were not begun for want of time."""
    original_quality: float | None = None
    """On the selection samples."""

    @property
    def seconds_left(self) -> float:
        """Return the unused seconds of the budget."""
        used = sum(point.seconds for point in self.taken) + sum(step.seconds or 0.0 for step in self.without_result)
        return self.budget_s - used

    def take(self, step: PlannedStep) -> StepResult | None:
        """Take a step, or read its result from the ledger; None where it gave none, with the reason recorded."""
        left = self.seconds_left
        if left <= 0 or step.expected_seconds > left:
            why = f"no time: about {step.expected_seconds:.0f} s needed, {max(0.0, left):.0f} s left of the budget"
            if not any(one.status == "skipped" and one.verb == step.verb for one in self.without_result):
                self._give_up(step, "skipped", why, None)
            return None
        key, asked = self.named(step)
        known = self.ledger.get(key)
        if known and known.verdict == "failed":
            self._give_up(step, "failed", known.why, known.seconds)
            return None
        run = self._finished(known) if known else None
        seconds = known.seconds if known and run else 0.0
        if run is None:
            began, request = self.clock(), parse(step.verb, asked)
            try:
                began -= self._take_over(key, step.verb, request)
                run = self.context.run_step(key, step.verb, request, self._live(step.parent), step.span)
            except OmgoptimError as error:
                why, seconds = ": ".join(filter(None, (error.what, error.why))), round(self.clock() - began, 2)
                if not isinstance(error, PASSING):
                    self._note(step, None, seconds, why)
                self._give_up(step, "failed", why, seconds)
                return None
            seconds = round(self.clock() - began, 2)
            known = None
        point = self._point(step, run, seconds)
        if known is None:
            self._note(step, point, seconds)
        self.taken.append(point)
        speed = "speed unknown" if point.speedup is None else f"{point.speedup:.2f}x"
        done = f"{step.name} done: {speed}, {point.size_bytes:,} bytes, drop {point.drop:.4f}, {seconds:.0f} s"
        self.context.progress(done, step.span[1])
        self.context.publish(self.records()[len(self.taken) - 1])
        return point

    def named(self, step: PlannedStep) -> tuple[str, dict[str, Any]]:
        """Return the key of a step, and all of its arguments."""
        asked = self._arguments(step.parent) | step.arguments
        return self._key(step.verb, asked, step.parent), asked

    def skip(self, name: str, verb: str, why: str) -> None:
        """Record that a step was not taken."""
        self._give_up(PlannedStep(name, verb, {}), "skipped", why, None)

    def alternatives(self, point: StepResult) -> list[StepResult]:
        """Return the other finalists that a step kept, as points of their own."""
        found = []
        for one in point.run.report.alternatives:
            folder = Path(one.path)
            if one.quality is not None and one.size_bytes and folder.is_dir():
                found.append(self._alternative(point, one, folder))
        return found

    def records(self) -> list[Step]:
        """Return the steps as records of the report."""
        front = pareto_points(self.taken)
        done = [
            Step(
                name=point.name,
                verb=point.verb,
                run_id=point.run.run_id,
                parent=point.parent.name if point.parent else None,
                status=point.status,
                why=point.why,
                seconds=round(point.seconds, 1),
                expected_speedup=point.expected_speedup,
                speedup=None if point.speedup is None else round(point.speedup, 3),
                size_bytes=point.size_bytes,
                quality=point.quality,
                quality_drop=point.drop,
                on_front=any(point is one for one in front),
            )
            for point in self.taken
        ]
        return [*done, *self.without_result]

    def _take_over(self, key: str, verb: str, step: Request) -> float:
        """Copy the checkpoints of a step that a worker trained into its run; return the worker's seconds, or 0."""
        trained = self.context.checkpoints / PARALLEL / key
        if not trained.is_dir():
            return 0.0
        folder = self.context.begin_step(key, verb, step)
        shutil.copytree(
            trained / self.context.checkpoints.name, folder / self.context.checkpoints.name, dirs_exist_ok=True
        )
        return float((trained / SECONDS_FILE).read_text(encoding="utf-8"))

    def _arguments(self, parent: StepResult | None) -> dict[str, Any]:
        shared = {name: getattr(self.request, name) for name in ModelRequest.model_fields}
        shared["timing"] = "quick"
        if parent is not None:
            shared = {name: value for name, value in shared.items() if name not in OF_THE_ORIGINAL}
            shared["model"] = str(parent.artifact)
        return shared

    def _live(self, parent: StepResult | None) -> Live:
        live = self.live
        return Live(
            module=live.module if parent is None else None,
            data=live.data,
            metric=live.metric,
            loss=live.loss,
            resplit=selection_as_evaluation,
        )

    def _key(self, verb: str, asked: dict[str, Any], parent: StepResult | None) -> str:
        settings = {name: value for name, value in asked.items() if name not in (*PLACE, "model")}
        versions = " ".join(f"{name} {version}" for name, version in sorted(_versions().items()))
        return key_of(
            parent=parent.run.run_id if parent else f"{self.request.model} {self.model}",
            step=verb,
            settings=settings,
            data=f"{self.request.data} {self.data}",
            engine=versions,
            seed=self.request.seed,
        )

    def _finished(self, entry: LedgerEntry) -> StepRun | None:
        """Return the run of a ledger's entry; None where its folder is gone."""
        if entry.artifact is None:
            return None
        folder = (self.context.folder / entry.artifact).resolve().parent
        found = read_report(folder / "report.json", folder.name)
        if found is None or not found[1] or not (folder / "artifact").is_dir():
            return None
        return StepRun(folder.name, folder, found[0])

    def _note(self, step: PlannedStep, point: StepResult | None, seconds: float, why: str = "") -> None:
        """Write what a step brought into the ledger; `why` it brought nothing."""
        key, asked = self.named(step)
        settings = {name: value for name, value in asked.items() if name not in PLACE}
        measured = Amounts()
        if point is not None:
            after = point.run.report.after
            measured = Amounts(
                latency_ms=after.latency_ms_p50 if after else None,
                speedup=point.speedup,
                size_bytes=point.size_bytes,
                quality=point.quality,
                quality_drop=point.drop,
            )
        within = point is not None and point.cautious_drop <= self.request.max_quality_drop
        speedup = point.expected_speedup if point else None
        self.ledger.append(
            LedgerEntry(
                key=key,
                parent=step.parent.run.run_id if step.parent else "original",
                step=step.verb,
                settings=settings,
                predicted=Amounts(speedup=speedup),
                measured=measured,
                seconds=seconds,
                verdict="failed" if point is None else "kept" if within else "rolled_back",
                why=why[:500],
                artifact=f"../{point.run.run_id}/artifact" if point else None,
            )
        )

    def _give_up(
        self, step: PlannedStep, status: Literal["failed", "skipped"], why: str, seconds: float | None
    ) -> None:
        parent = step.parent.name if step.parent else None
        self.without_result.append(
            Step(name=step.name, verb=step.verb, parent=parent, status=status, why=why, seconds=seconds)
        )

    def _point(self, step: PlannedStep, run: StepRun, seconds: float) -> StepResult:
        parent = step.parent
        report = run.report
        drop, cautious, quality = self._drops(report)
        ruined = any(output.ruined and not output.labelled for output in report.outputs)
        return StepResult(
            name=step.name,
            verb=step.verb,
            run=run,
            artifact=run.folder / "artifact",
            parent=parent,
            speedup=product(parent.speedup if parent else 1.0, report.gains.speedup if report.gains else None),
            work_ratio=(parent.work_ratio if parent else 1.0) * ((report.gains and report.gains.macs_ratio) or 1.0),
            size_bytes=(report.after.size_bytes if report.after else None) or 0,
            quality=quality,
            drop=drop,
            cautious_drop=math.inf if ruined else cautious,
            seconds=seconds,
            expected_speedup=step.expected_speedup,
            ruined=ruined,
            measured=report.after,
        )

    def _drops(self, report: EfficiencyReport) -> tuple[float, float, float]:
        before = report.before.quality if report.before else None
        after = report.after.quality if report.after else None
        if self.original_quality is None:
            self.original_quality = before
        if after is None or self.original_quality is None:
            return 1.0, 1.0, after or 0.0
        drop = self.original_quality - after
        gains = report.gains
        spread = 0.0
        if gains and gains.quality_drop is not None and gains.quality_drop_high is not None:
            spread = gains.quality_drop_high - gains.quality_drop
        return drop, with_margin(drop, drop + spread, self.request.max_quality_drop), after

    def _alternative(self, point: StepResult, one: Alternative, folder: Path) -> StepResult:
        quality = one.quality or 0.0
        drop = (self.original_quality or quality) - quality
        margin = 0.0 if point.ruined else point.cautious_drop - point.drop
        guard = float(point.run.report.request.get("max_quality_drop", math.inf))
        ruined = not one.holds and (one.quality_drop or 0.0) <= guard
        own = read_report(folder.with_name(f"{one.name}.json"), point.run.run_id)
        return StepResult(
            name=f"{point.name}: {one.candidate}",
            verb=point.verb,
            run=point.run,
            artifact=folder,
            parent=point.parent,
            speedup=product(point.parent.speedup if point.parent else 1.0, one.speedup),
            work_ratio=point.work_ratio,
            size_bytes=one.size_bytes or 0,
            quality=quality,
            drop=drop,
            cautious_drop=math.inf if ruined else drop + margin,
            seconds=0.0,
            ruined=ruined,
            measured=own[0].after if own else None,
        )


def _versions() -> dict[str, str]:
    import importlib.metadata

    found = {"omgoptim": omgoptim.__version__}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
