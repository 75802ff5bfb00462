"""The steps of an optimize run: ordinary runs on selection data, kept in a ledger, never done twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import omgoptim
from omgoptim.errors import OmgoptimError
from omgoptim.models.report_file import read_report
from omgoptim.operations.context import RunContext, StepRun
from omgoptim.operations.ledger import Amounts, Entry, Ledger, key_of
from omgoptim.operations.live_objects import Live
from omgoptim.operations.optimization.selection_data import selection_as_evaluation
from omgoptim.operations.report_records import VERSIONS
from omgoptim.operations.verdict import with_margin
from omgoptim.reports import Alternative, EfficiencyReport, Step
from omgoptim.requests import ModelRequest, OptimizeRequest, parse

PLACE = ("project", "python", "timing")
"""Arguments of a request that decide nothing of a step's result."""

OF_THE_ORIGINAL = ("checkpoint", "weights", "model_kwargs")
"""Arguments that build the original: an artifact needs none of them."""


@dataclass(slots=True, eq=False)
class Point:
    """An artifact that a step made, with what it was measured to be on the selection samples."""

    name: str
    verb: str
    run: StepRun
    artifact: Path
    parent: Point | None
    speedup: float
    """Latency of the original over this one's, from single launches."""
    size_bytes: int
    quality: float
    drop: float
    """Quality of the original less this one's."""
    cautious_drop: float
    """The drop with a margin for what so many samples cannot tell."""
    seconds: float
    expected_speedup: float | None = None
    status: Literal["kept", "rolled_back"] = "rolled_back"
    why: str = ""

    @property
    def chain(self) -> list[Point]:
        """The points it was made from, the first step first, itself last."""
        return [*(self.parent.chain if self.parent else []), self]


@dataclass(slots=True)
class Steps:
    """Takes steps, and knows what they brought."""

    request: OptimizeRequest
    context: RunContext
    live: Live
    ledger: Ledger
    deadline: float
    """When no further step begins, by `clock`."""
    clock: Callable[[], float] = time.monotonic
    taken: list[Point] = field(default_factory=list)
    failed: list[Step] = field(default_factory=list)
    original_quality: float | None = None
    """On the selection samples."""

    @property
    def seconds_left(self) -> float:
        return self.deadline - self.clock()

    def take(
        self,
        name: str,
        verb: str,
        arguments: dict[str, Any],
        parent: Point | None,
        span: tuple[float, float],
        expected_speedup: float | None = None,
    ) -> Point | None:
        """Take a step, or read what it brought from the ledger; None where it failed, with the reason recorded.

        Args:
            arguments: of the verb, beside those that every verb shares.
            parent: what it starts from; None for the original.
            span: fraction of the whole run that it takes.
        """
        asked = self._arguments(parent) | arguments
        key = self._key(verb, asked, parent)
        known = self.ledger.get(key)
        run = self._finished(known) if known else None
        seconds = known.seconds if known else 0.0
        if known and known.verdict == "failed":
            self._fail(name, verb, parent, known.why, seconds)
            return None
        if run is None:
            began = self.clock()
            try:
                run = self.context.run_step(verb, parse(verb, asked), self._live(parent), span)
            except OmgoptimError as error:
                why = f"{error.what}: {error.why}" if error.why else error.what
                seconds = self.clock() - began
                self._note(key, verb, asked, parent, None, seconds, why)
                self._fail(name, verb, parent, why, seconds)
                return None
            seconds = self.clock() - began
        point = self._point(name, verb, run, parent, seconds, expected_speedup)
        if known is None:
            self._note(key, verb, asked, parent, point, seconds, "")
        self.taken.append(point)
        return point

    def alternatives(self, point: Point) -> list[Point]:
        """Return the other finalists that a step kept, as points of their own."""
        found = []
        for one in point.run.report.alternatives:
            folder = Path(one.path)
            if one.quality is not None and one.size_bytes and folder.is_dir():
                found.append(self._alternative(point, one, folder))
        return found

    def records(self) -> list[Step]:
        """Return what was done, as the report shows it."""
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
                speedup=round(point.speedup, 3),
                size_bytes=point.size_bytes,
                quality=point.quality,
                quality_drop=point.drop,
            )
            for point in self.taken
        ]
        return [*done, *self.failed]

    def _arguments(self, parent: Point | None) -> dict[str, Any]:
        shared = {name: getattr(self.request, name) for name in ModelRequest.model_fields}
        shared["timing"] = "quick"
        if parent is not None:
            shared = {name: value for name, value in shared.items() if name not in OF_THE_ORIGINAL}
            shared["model"] = str(parent.artifact)
        return shared

    def _live(self, parent: Point | None) -> Live:
        live = self.live
        return Live(
            module=live.module if parent is None else None,
            data=live.data,
            metric=live.metric,
            loss=live.loss,
            resplit=selection_as_evaluation,
        )

    def _key(self, verb: str, asked: dict[str, Any], parent: Point | None) -> str:
        settings = {name: value for name, value in asked.items() if name not in (*PLACE, "model")}
        versions = " ".join(f"{name} {version}" for name, version in sorted(_versions().items()))
        return key_of(
            parent=parent.run.run_id if parent else self.request.model,
            step=verb,
            settings=settings,
            data=str(self.request.data),
            engine=versions,
            seed=self.request.seed,
        )

    def _finished(self, entry: Entry) -> StepRun | None:
        """Return the run of a ledger's entry; None where its folder is gone."""
        if entry.artifact is None:
            return None
        folder = (self.context.folder / entry.artifact).resolve().parent
        found = read_report(folder / "report.json", folder.name)
        if found is None or not found[1] or not (folder / "artifact").is_dir():
            return None
        return StepRun(folder.name, folder, found[0])

    def _note(
        self,
        key: str,
        verb: str,
        asked: dict[str, Any],
        parent: Point | None,
        point: Point | None,
        seconds: float,
        why: str,
    ) -> None:
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
        self.ledger.append(
            Entry(
                key=key,
                parent=parent.run.run_id if parent else "original",
                step=verb,
                settings=settings,
                predicted=Amounts(speedup=point.expected_speedup if point else None),
                measured=measured,
                seconds=round(seconds, 2),
                verdict="failed" if point is None else "kept" if within else "rolled_back",
                why=why[:500],
                artifact=f"../{point.run.run_id}/artifact" if point else None,
            )
        )

    def _fail(self, name: str, verb: str, parent: Point | None, why: str, seconds: float) -> None:
        from_step = parent.name if parent else None
        self.failed.append(
            Step(name=name, verb=verb, parent=from_step, status="failed", why=why, seconds=round(seconds, 1))
        )

    def _point(
        self, name: str, verb: str, run: StepRun, parent: Point | None, seconds: float, expected: float | None
    ) -> Point:
        report = run.report
        drop, cautious, quality = self._drops(report)
        return Point(
            name=name,
            verb=verb,
            run=run,
            artifact=run.folder / "artifact",
            parent=parent,
            speedup=(parent.speedup if parent else 1.0) * _speedup(report),
            size_bytes=(report.after.size_bytes if report.after else None) or 0,
            quality=quality,
            drop=drop,
            cautious_drop=cautious,
            seconds=seconds,
            expected_speedup=expected,
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

    def _alternative(self, point: Point, one: Alternative, folder: Path) -> Point:
        quality = one.quality or 0.0
        drop = (self.original_quality or quality) - quality
        margin = point.cautious_drop - point.drop
        ratio = (one.speedup or 1.0) if one.speedup else 1.0
        return Point(
            name=f"{point.name}: {one.candidate}",
            verb=point.verb,
            run=point.run,
            artifact=folder,
            parent=point.parent,
            speedup=(point.parent.speedup if point.parent else 1.0) * ratio,
            size_bytes=one.size_bytes or 0,
            quality=quality,
            drop=drop,
            cautious_drop=drop + margin,
            seconds=0.0,
        )


def _speedup(report: EfficiencyReport) -> float:
    """Latency before over after; where the machine was too busy to time anything, the ratio of the work."""
    gains = report.gains
    if gains is None:
        return 1.0
    return gains.speedup or gains.macs_ratio or 1.0


def _versions() -> dict[str, str]:
    import importlib.metadata

    found = {"omgoptim": omgoptim.__version__}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
