"""Optuna study of a search (ask-and-tell interface), in a journal file of the run folder with a single writer.

Quality is the only objective; limits are constraints, given as `load - 1` by `Trial.set_constraint` (Optuna 5). A trial
that is too slow is PRUNED before it is trained, and does not count as a trial of the search.

After a kill, `resume` compares each trial that has no result in the study with its folder:

    the folder has a result     the result is added to the study
    there is no folder          the trial fails, and its parameters are proposed again, first
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omgoptim.architecture_search.halving import expected_final_qualities
from omgoptim.architecture_search.propose import Observations
from omgoptim.architecture_search.space import Configuration, Space
from omgoptim.errors import SetupError

if TYPE_CHECKING:
    import optuna


STARTUP = 10
"""Trials that TPE draws at random before it models anything: Optuna's default."""

COUNTS, REASON, LOST, REPLACES = "counts", "reason", "lost", "replaces"
"""User attributes of trials: it was trained, why it failed, a kill ended it, the number of the lost one it repeats."""


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Settings of a study, unchanged on resume."""

    seed: int = 0
    journal: Path | None = None
    """The file that Optuna appends to; None keeps the study in memory."""
    name: str = "search"


@dataclass(frozen=True, slots=True)
class Rejected:
    """Rejection of a candidate: its loads, at least one of them above 1."""

    loads: Mapping[str, float]
    """Measured over allowed, by constraint: latency, size."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Result of a trained trial."""

    rungs: tuple[float, ...]
    """Quality at each rung of successive halving that it reached; at least one."""
    loads: Mapping[str, float] = field(default_factory=dict)
    complete: bool = True
    """False: successive halving stopped it early."""


class SearchStudy:
    """An Optuna study with a single writer.

    Raises:
        SetupError: Optuna is absent, or older than 5.
    """

    def __init__(self, settings: SearchSettings) -> None:
        self.settings = settings
        library = optuna_library()
        storage: optuna.storages.BaseStorage = library.storages.InMemoryStorage()
        if settings.journal is not None:
            storage = library.storages.JournalStorage(journal_backend(library, settings.journal))
        self.study = library.create_study(
            storage=storage,
            study_name=settings.name,
            direction="maximize",
            sampler=library.samplers.RandomSampler(seed=settings.seed),
            load_if_exists=True,
        )

    def __len__(self) -> int:
        """Count the trials that were trained."""
        return sum(bool(trial.user_attrs.get(COUNTS)) for trial in self._trials())

    @property
    def started(self) -> int:
        """Number of started trials, rejected and failed ones included, a lost one and its repetition counted once.

        It is the number of the next proposal, whether or not the search was interrupted.
        """
        return sum(LOST not in trial.user_attrs for trial in self._trials())

    def ask(self, space: Space, configuration: Configuration) -> optuna.trial.Trial:
        """Start a trial of a configuration from the proposal rule; call `ask_again` first after a kill."""
        self.study.enqueue_trial(dict(configuration))
        return self._suggested(space)

    def ask_again(self, space: Space) -> optuna.trial.Trial | None:
        """Begin the next trial that was lost to a kill; None when there is none."""
        return self._suggested(space) if self.waiting() else None

    def ask_sampler(self) -> optuna.trial.Trial:
        """Begin a trial of a conditional space by TPE; a lost one comes first, with its parameters."""
        library = optuna_library()
        seed = int(np.random.default_rng([self.settings.seed, self.started - self.waiting()]).integers(2**31))
        # A sampler of its own for each trial: a resumed search draws what an uninterrupted one would.
        self.study.sampler = library.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP)
        trial: optuna.trial.Trial = self.study.ask()
        return trial

    def finish(self, trial: optuna.trial.Trial | int, result: Finished) -> None:
        """End a trained trial with the result in its folder."""
        bad = [quality for quality in result.rungs if not math.isfinite(quality)]
        if bad or not result.rungs:
            self.fail(trial, f"its quality is {bad[0]}" if bad else "it has no quality")
            return
        live = self._live(trial)
        live.set_user_attr(COUNTS, True)
        _constrain(live, result.loads)
        known = self._trials()[live.number].intermediate_values  # of a kill between the report and the end
        for rung, quality in enumerate(result.rungs):
            if rung not in known:
                live.report(quality, rung)
        states = optuna_library().trial.TrialState
        if result.complete:
            self.study.tell(live, result.rungs[-1])
        else:
            self.study.tell(live, state=states.PRUNED)

    def reject(self, trial: optuna.trial.Trial | int, rejected: Rejected) -> None:
        """End a trial that was measured or predicted to break a constraint, before it was trained."""
        live = self._live(trial)
        _constrain(live, rejected.loads)
        self.study.tell(live, state=optuna_library().trial.TrialState.PRUNED)

    def fail(self, trial: optuna.trial.Trial | int, reason: str) -> None:
        """End a trial that raised, with its reason."""
        live = self._live(trial)
        live.set_user_attr(REASON, reason[:500])
        self.study.tell(live, state=optuna_library().trial.TrialState.FAIL)

    def resume(self, result_of: Callable[[int], Finished | Rejected | str | None]) -> list[int]:
        """Add results of the trial folders to the study after a kill; return the trials to repeat.

        Args:
            result_of: what the folder of a trial's number holds, the reason of a failed one; None when there is none.
        """
        lost = []
        for trial in self._trials():
            if trial.state != optuna_library().trial.TrialState.RUNNING:
                continue
            result = result_of(trial.number)
            if isinstance(result, Finished):
                self.finish(trial.number, result)
            elif isinstance(result, Rejected):
                self.reject(trial.number, result)
            elif isinstance(result, str):
                self.fail(trial.number, result)
            else:
                lost.append(trial.number)
                self._repeat(trial)
        return lost

    def _repeat(self, trial: optuna.trial.FrozenTrial) -> None:
        """Ask for a lost trial again, then end it: killed between the two, the next resume does not ask twice."""
        number = trial.number
        if not any(other.user_attrs.get(REPLACES) == number for other in self._trials()):
            parameters = trial.system_attrs.get("fixed_params", trial.params)
            self.study.enqueue_trial(dict(parameters), user_attrs={REPLACES: number})
        live = self._live(number)
        live.set_user_attr(LOST, True)
        self.study.tell(live, state=optuna_library().trial.TrialState.FAIL)

    def waiting(self) -> int:
        """Count the trials that were lost to a kill and not begun again."""
        return sum(trial.state == optuna_library().trial.TrialState.WAITING for trial in self._trials())

    def observations(self, space: Space) -> Observations:
        """Return the observations of the proposal rule: trained configurations, and those rejected or in flight."""
        rows, histories, out = [], [], []
        for trial in self._trials():
            begun = trial.state == optuna_library().trial.TrialState.RUNNING
            if not (trial.state.is_finished() or begun) or LOST in trial.user_attrs:
                continue
            if trial.user_attrs.get(COUNTS):
                rows.append(space.row(trial.params))
                histories.append(_history(trial))
            elif len(trial.params) == len(space.knobs):
                out.append(space.row(trial.params))
        none = np.empty((0, len(space.knobs)), dtype=np.int64)
        return Observations(
            np.array(rows, dtype=np.int64) if rows else none,
            expected_final_qualities(histories),
            np.array(out, dtype=np.int64) if out else none,
        )

    def best(self) -> tuple[int, float] | None:
        """Return number and quality of the best trial that was trained to the end; None when there is none."""
        complete = optuna_library().trial.TrialState.COMPLETE
        done = [trial for trial in self._trials() if trial.state == complete and trial.value is not None]
        if not done:
            return None
        best = max(done, key=lambda trial: (trial.value, -trial.number))
        return best.number, float(best.value or 0.0)

    def reasons(self) -> list[str]:
        """Return why trials failed, the commonest reason first."""
        found = [str(trial.user_attrs[REASON]) for trial in self._trials() if REASON in trial.user_attrs]
        return sorted(dict.fromkeys(found), key=lambda reason: -found.count(reason))

    def _suggested(self, space: Space) -> optuna.trial.Trial:
        categorical = optuna_library().distributions.CategoricalDistribution
        trial: optuna.trial.Trial = self.study.ask({knob.name: categorical(knob.options) for knob in space.knobs})
        return trial

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        trials: list[optuna.trial.FrozenTrial] = self.study.get_trials(deepcopy=False)
        return trials

    def _live(self, trial: optuna.trial.Trial | int) -> optuna.trial.Trial:
        if not isinstance(trial, int):
            return trial
        live: optuna.trial.Trial = optuna_library().trial.Trial(self.study, self._trials()[trial]._trial_id)
        return live


def _history(trial: optuna.trial.FrozenTrial) -> tuple[float, ...]:
    return tuple(value for _, value in sorted(trial.intermediate_values.items()))


def _constrain(trial: optuna.trial.Trial, loads: Mapping[str, float]) -> None:
    """Set each load as a constraint, which holds at 0 and below."""
    for name, load in loads.items():
        trial.set_constraint(name, load - 1.0)


def optuna_library() -> Any:
    """Return the module optuna.

    Raises:
        SetupError: it is absent, or older than 5.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise SetupError(
            "a search needs the package optuna", "it is not installed here", "pip install 'omgoptim[search]'"
        ) from error
    if int(optuna.__version__.split(".")[0]) < 5:
        raise SetupError(
            f"a search needs Optuna 5 or later, and this is {optuna.__version__}",
            "constraints are set by Trial.set_constraint",
            "pip install -U 'omgoptim[search]'",
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class NoLock:
    """A lock for Optuna's journal that is always free."""

    def acquire(self) -> bool:
        """Return True: the lock is always acquired."""
        return True

    def release(self) -> None:
        """Do nothing."""


def journal_backend(library: Any, path: Path) -> Any:
    """Return Optuna's file backend on a journal whose torn last line, if any, was cut."""
    truncate_torn_line(path)
    return library.storages.journal.JournalFileBackend(str(path), lock_obj=NoLock())


def truncate_torn_line(path: Path) -> int:
    """Cut the text after the last line end of a file; return how many bytes that were.

    A missing file is ignored.
    """
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return len(data) - end
