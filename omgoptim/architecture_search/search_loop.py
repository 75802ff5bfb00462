"""Loop of a search: propose a trial, run it and record its result, until enough trials were trained.

A trial that is too slow costs a measurement and does not count. After a kill, `search_product` resumes in the same
folder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omgoptim.architecture_search.propose import DEFAULT, Load, Proposer, Rule, propose
from omgoptim.architecture_search.space import Space
from omgoptim.architecture_search.study import Finished, Rejected, SearchSettings, SearchStudy
from omgoptim.architecture_search.trials import TrialFolders, TrialResult, TrialSpec
from omgoptim.errors import RequestError, TechniqueError


@dataclass(frozen=True, slots=True)
class StartedTrial:
    """A trial in flight, here or on a worker."""

    wait: Callable[[], TrialResult]
    """Waits for its end, and returns its result."""
    rejected: bool = False
    """True if it has ended, because it misses a target."""


REJECTED_PER_TRIAL = 10
"""Maximum rejected candidates per requested trial, before the search gives up. Chosen: a space with fewer accepted
networks needs other targets."""


@dataclass(frozen=True, slots=True)
class LoopSettings:
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
class SearchCounts:
    """Numbers of trials by outcome, and the best one."""

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

    start: Callable[[TrialSpec], StartedTrial]
    """Begins a trial, whose result is a function of its specification alone."""
    plan: LoopSettings
    folder: Path
    progress: Callable[[str, float | None], None] = lambda _stage, _done: None
    """`progress(stage, fraction)` of the search."""
    more: Callable[[], bool] = lambda: True
    """Return True while another trial may begin: there is time left."""

    def run(
        self,
        again: Callable[[SearchStudy], Any],
        begin: Callable[[SearchStudy, dict[int, TrialResult]], Any],
        nearest: float | None = None,
    ) -> SearchCounts:
        """Run trials until enough were trained.

        Args:
            again: the next of the trials that were begun before an interruption; None where there is none.
            begin: a new trial by the results so far; None where the space is exhausted.
            nearest: as for `search_product`.
        """
        plan, folders = self.plan, TrialFolders(self.folder / "trials")
        folders.clear()
        study = SearchStudy(SearchSettings(seed=plan.seed, journal=self.folder / "study.log"))
        study.resume(lambda number: None if (found := folders.result(number)) is None else found.for_study())
        results = folders.results()
        in_flight: deque[tuple[Any, StartedTrial]] = deque()
        exhausted = False
        while True:
            counted = len(study) + sum(not each.rejected for _, each in in_flight)
            optuna_trial = None
            if counted < plan.trials and len(in_flight) < plan.in_flight and not exhausted and self.more():
                optuna_trial = again(study) or begin(study, results)
                exhausted = optuna_trial is None and not in_flight
            if optuna_trial is not None:
                self.progress(f"trial {counted + 1} of {plan.trials}", len(study) / plan.trials)
                in_flight.append((optuna_trial, self._started(optuna_trial)))
                continue
            if not in_flight:
                break
            optuna_trial, started = in_flight.popleft()
            results[optuna_trial.number] = found = started.wait()
            _record(study, optuna_trial, found)
            exhausted = exhausted or len(results) >= plan.trials * (1 + REJECTED_PER_TRIAL)
        return _counts_of(study, results, exhausted and len(study) < plan.trials, nearest)

    def _started(self, optuna_trial: Any) -> StartedTrial:
        return self.start(
            TrialSpec(
                number=optuna_trial.number,
                configuration=dict(optuna_trial.params),
                seed=self.plan.seed,
                parent=self.plan.parent,
                data=self.plan.data,
                epochs=self.plan.epochs,
            )
        )


def search_product(
    space: Space,
    loads: Callable[[dict[int, TrialResult]], Load],
    loop: TrialLoop,
    proposal: Proposer = propose,
    rule: Rule = DEFAULT,
    nearest: float | None = None,
) -> SearchCounts:
    """Search a product of knobs by a proposal rule.

    Args:
        space: the product of knobs.
        loads: the predicted load given the trials so far; called before each proposal, so that it can learn from what
            was measured.
        loop: runs the trials.
        proposal: how the next configuration is proposed.
        rule: settings of `proposal`.
        nearest: smallest load measured before the search, for the error when nothing is predicted within the limits.

    Raises:
        TechniqueError: every trial failed, or every candidate was measured to be over the limits.
        RequestError: the time was over before the first trial.
    """

    def begin(study: SearchStudy, results: dict[int, TrialResult]) -> Any:
        row = proposal(space, loads(results), study.observations(space), loop.plan.seed, study.started, rule)
        return None if row is None else study.ask(space, space.configuration(row))

    return loop.run(partial(SearchStudy.ask_again, space=space), begin, nearest)


def search_conditional(parameters: Callable[[Any], Any], loop: TrialLoop) -> SearchCounts:
    """Search a conditional space by TPE; what misses a target is rejected by the trial's measurement.

    Args:
        parameters: asks an Optuna trial for all that the space varies.
        loop: runs the trials.

    Raises:
        TechniqueError: as for `search_product`.
    """

    def ask(study: SearchStudy) -> Any:
        optuna_trial = study.ask_sampler()
        parameters(optuna_trial)
        return optuna_trial

    def begin(study: SearchStudy, _results: dict[int, TrialResult]) -> Any:
        return ask(study) if study.started < loop.plan.trials * (1 + REJECTED_PER_TRIAL) else None

    return loop.run(lambda study: ask(study) if study.waiting() else None, begin)


def _record(study: SearchStudy, optuna_trial: Any, result: TrialResult) -> None:
    ended = result.for_study()
    if isinstance(ended, Finished):
        study.finish(optuna_trial, ended)
    elif isinstance(ended, Rejected):
        study.reject(optuna_trial, ended)
    else:
        study.fail(optuna_trial, ended)


def _counts_of(
    study: SearchStudy, results: dict[int, TrialResult], exhausted: bool, nearest: float | None
) -> SearchCounts:
    outcomes = [result.outcome for result in results.values()]
    trained = len(study)
    if not trained:
        reasons = study.reasons()
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
    best = study.best()
    return SearchCounts(trained, outcomes.count("rejected"), outcomes.count("failed"), exhausted, best and best[0])
