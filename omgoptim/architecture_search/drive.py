"""Loop of a search: propose a trial, run it and record its result, until enough trials were trained.

A trial that is too slow costs a measurement and does not count. After a kill, `drive` on the same folder resumes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omgoptim.architecture_search.propose import DEFAULT, Load, Proposer, Rule, propose
from omgoptim.architecture_search.space import Configuration, Space
from omgoptim.architecture_search.study import Finished, Rejected, Search, SearchSettings
from omgoptim.architecture_search.trials import TrialFolders, TrialResult, TrialSpec
from omgoptim.errors import RequestError, TechniqueError

Trial = Callable[[TrialSpec, Path], TrialResult]
"""`trial(spec, folder)`: build, measure, train; a function of the spec alone."""


@dataclass(frozen=True, slots=True)
class Started:
    """A started trial."""

    wait: Callable[[], TrialResult]
    """Waits for its end, and returns its result."""
    rejected: bool = False
    """True if it has ended, because it misses a target."""


REJECTED_PER_TRIAL = 10
"""Maximum rejected candidates per requested trial, before the search gives up. Chosen: a space with fewer accepted
networks needs other targets."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of a search."""

    trials: int
    seed: int
    parent: str
    data: str
    epochs: int
    in_flight: int = 1
    """Number of trials in flight at the same time.

    A trial is proposed from the results of all but the latest `in_flight - 1` before it, whichever of those have ended:
    which trials a search has depends on this number, and not on how many workers run them.
    """


@dataclass(frozen=True, slots=True)
class Driven:
    """Result of a search."""

    trained: int
    rejected: int
    failed: int
    exhausted: bool
    """True if all networks predicted within the limits were tried before enough trials ended."""
    best: int | None
    """Number of the best trial that was trained to the end."""


@dataclass(frozen=True, slots=True)
class TrialLoop:
    """Runs the trials of a search in a folder; a search that was started there is resumed."""

    trial: Trial
    """Runs one trial."""
    plan: Plan
    folder: Path
    progress: Callable[[str, float | None], None] = lambda _stage, _done: None
    """`progress(stage, fraction)` of the search."""
    more: Callable[[], bool] = lambda: True
    """Return True while another trial may begin: there is time left."""
    start: Callable[[TrialSpec], Started] | None = None
    """Begins a trial elsewhere, in place of running `trial` here."""

    def run(
        self,
        again: Callable[[Search], Any],
        begin: Callable[[Search, dict[int, TrialResult]], Any],
        nearest: float | None = None,
    ) -> Driven:
        """Run trials until enough were trained.

        Args:
            again: the next of the trials that were begun before an interruption; None where there is none.
            begin: a new trial by the results so far; None where the space is exhausted.
            nearest: as for `drive`.
        """
        plan, folders = self.plan, TrialFolders(self.folder / "trials")
        folders.clear()
        search = Search(SearchSettings(seed=plan.seed, journal=self.folder / "study.log"))
        search.resume(lambda number: None if (found := folders.result(number)) is None else found.for_study())
        results = folders.results()
        in_flight: deque[tuple[Any, Started]] = deque()
        exhausted = False
        while True:
            counted = len(search) + sum(not each.rejected for _, each in in_flight)
            asked = None
            if counted < plan.trials and len(in_flight) < plan.in_flight and not exhausted and self.more():
                asked = again(search) or begin(search, results)
                exhausted = asked is None and not in_flight
            if asked is not None:
                self.progress(f"trial {counted + 1} of {plan.trials}", len(search) / plan.trials)
                in_flight.append((asked, self._started(asked, folders)))
                continue
            if not in_flight:
                break
            asked, started = in_flight.popleft()
            results[asked.number] = found = started.wait()
            _record(search, asked, found)
            exhausted = exhausted or len(results) >= plan.trials * (1 + REJECTED_PER_TRIAL)
        return _ended(search, results, exhausted and len(search) < plan.trials, nearest)

    def _started(self, asked: Any, folders: TrialFolders) -> Started:
        spec = TrialSpec(
            number=asked.number,
            configuration=dict(asked.params),
            seed=self.plan.seed,
            parent=self.plan.parent,
            data=self.plan.data,
            epochs=self.plan.epochs,
        )
        if self.start is not None:
            return self.start(spec)
        found = folders.run(spec, self.trial)
        return Started(lambda: found, found.outcome == "rejected")


def drive(
    space: Space,
    loads: Callable[[dict[int, TrialResult]], Load],
    loop: TrialLoop,
    way: Proposer = propose,
    rule: Rule = DEFAULT,
    nearest: float | None = None,
) -> Driven:
    """Search a product of knobs by a proposal rule.

    Args:
        space: the product of knobs.
        loads: the predicted load given the trials so far; called before each proposal, so that it can learn from what
            was measured.
        loop: runs the trials.
        way: how the next configuration is proposed.
        rule: settings of `way`.
        nearest: smallest load measured before the search, for the error when nothing is predicted within the limits.

    Raises:
        TechniqueError: every trial failed, or every candidate was measured to be over the limits.
        RequestError: the time was over before the first trial.
    """

    def begin(search: Search, results: dict[int, TrialResult]) -> Any:
        row = way(space, loads(results), search.observations(space), loop.plan.seed, search.asked, rule)
        return None if row is None else search.ask(space, space.configuration(row))

    return loop.run(partial(Search.ask_again, space=space), begin, nearest)


def drive_conditional(
    parameters: Callable[[Any], Configuration],
    predicted: Callable[[Configuration], dict[str, float]] | None,
    loop: TrialLoop,
) -> Driven:
    """Search a conditional space by TPE, rejecting what is predicted to be over the limits.

    Args:
        parameters: asks an Optuna trial for all that the space varies, and returns it.
        predicted: loads of a configuration by constraint, or None to leave rejecting to the trial's measurement.
        loop: runs the trials.

    Raises:
        TechniqueError: as for `drive`.
    """

    def begin(search: Search, _results: dict[int, TrialResult]) -> Any:
        while search.asked < loop.plan.trials * (1 + REJECTED_PER_TRIAL):
            asked = search.ask_sampler()
            configuration = parameters(asked)
            found = predicted(configuration) if predicted is not None else {}
            if max(found.values(), default=0.0) <= 1.0:
                return asked
            search.reject(asked, Rejected(found))
        return None

    def again(search: Search) -> Any:
        if not search.waiting():
            return None
        asked = search.ask_sampler()
        parameters(asked)
        return asked

    return loop.run(again, begin)


def _record(search: Search, asked: Any, result: TrialResult) -> None:
    ended = result.for_study()
    if isinstance(ended, Finished):
        search.finish(asked, ended)
    elif isinstance(ended, Rejected):
        search.reject(asked, ended)
    else:
        search.fail(asked, ended)


def _ended(search: Search, results: dict[int, TrialResult], exhausted: bool, nearest: float | None) -> Driven:
    outcomes = [result.outcome for result in results.values()]
    trained = len(search)
    if not trained:
        reasons = search.reasons()
        if not results and not exhausted:
            raise RequestError(
                "the budget is too short for a trial",
                "it ended before the first trial began",
                "give a larger budget_minutes",
            )
        if reasons:
            raise TechniqueError("no trial of the search could be trained", reasons[0])
        nearest = min((max(each.loads.values(), default=1.0) for each in results.values()), default=nearest)
        raise TechniqueError(
            "no network of the search meets the targets",
            "none is predicted to meet them"
            if nearest is None
            else f"the nearest measured network is at {nearest:.2f} times a limit",
            "allow more latency or size, or give a space with smaller networks",
        )
    best = search.best()
    return Driven(trained, outcomes.count("rejected"), outcomes.count("failed"), exhausted, best and best[0])
