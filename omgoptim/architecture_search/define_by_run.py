"""Search space of a user's `space(trial) -> nn.Module`, in Optuna's define-by-run style.

The function is called a few times with random options. If every call asks for the same finite choices, the space is a
product of knobs and the proposal rule searches it; otherwise it is conditional or continuous, and TPE does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import nn

from omgoptim.architecture_search.space import Configuration, Knob, Option, Space
from omgoptim.errors import UserCodeError

PROBE_CALLS = 8
"""Calls with random options before a space counts as a product: a condition on a choice of two options stays unseen in
fewer than 1 of 100 spaces."""
MAX_STEPS = 64
"""Maximum values of a stepped number that counts as a finite choice. Chosen: the surrogate has a weight for each
value."""

Choice = TypeVar("Choice", str, int, float, bool, None)


class DrawnTrial:
    """A trial that draws each parameter uniformly, or takes it from given ones, and records the requests.

    It has the part of `optuna.trial.Trial` that a space uses: `suggest_categorical`, `suggest_int`, `suggest_float`,
    `params`, `number` and `set_user_attr`.
    """

    def __init__(self, generator: np.random.Generator | None = None, given: Configuration | None = None) -> None:
        self.number = 0
        self.params: dict[str, Option] = {}
        self.choices: dict[str, tuple[Option, ...] | None] = {}
        """Options of each parameter; None for one that is not finite."""
        self._generator = generator
        self._given = given or {}

    def suggest_categorical(self, name: str, choices: Sequence[Choice]) -> Choice:
        """Choose one of some options."""
        options = tuple(choices)
        self._note(name, options, lambda generator: options[int(generator.integers(len(options)))])
        return self.params[name]  # type: ignore[return-value]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:  # noqa: ARG002  Optuna's
        """Choose a whole number from low to high, both included."""
        values = range(low, high + 1, step)
        options = tuple(values) if len(values) <= MAX_STEPS else None
        self._note(name, options, lambda generator: int(values[int(generator.integers(len(values)))]))
        return int(self.params[name])  # type: ignore[arg-type]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Choose a number from low to high; finite only with a step."""
        count = 0 if step is None else int(np.floor((high - low) / step + 1e-9)) + 1
        options = tuple(low + step * index for index in range(count)) if step and 0 < count <= MAX_STEPS else None
        self._note(name, options, lambda generator: float(_drawn(generator, low, high, options, log)))
        return float(self.params[name])  # type: ignore[arg-type]

    def set_user_attr(self, key: str, value: Any) -> None:
        """Ignore a user attribute."""

    def _note(
        self, name: str, options: tuple[Option, ...] | None, draw: Callable[[np.random.Generator], Option]
    ) -> None:
        if name in self.params:
            return
        self.choices[name] = options
        if name in self._given:
            self.params[name] = self._given[name]
        elif self._generator is not None:
            self.params[name] = draw(self._generator)
        else:
            raise UserCodeError(f"the space asks for '{name}', which this trial does not have")


@dataclass(frozen=True, slots=True)
class ProbedSpace:
    """Result of a few calls of a space."""

    space: Space | None
    """The product of knobs; None for a conditional or continuous space."""
    reasons: tuple[str, ...]
    """Reasons of the calls that failed."""
    calls: int


def probe_space(function: Callable[[Any], Any], seed: int, calls: int = PROBE_CALLS) -> ProbedSpace:
    """Call a space with random options and infer what it varies.

    Raises:
        UserCodeError: every call failed, or none requested a choice.
    """
    seen: list[Mapping[str, tuple[Option, ...] | None]] = []
    reasons = []
    for number in range(calls):
        trial = DrawnTrial(np.random.default_rng([seed, number]))
        try:
            module_of(function, trial)
        except UserCodeError as error:
            reasons.append(error.reason)
            continue
        seen.append(trial.choices)
    if not seen:
        commonest = max(reasons, key=reasons.count)
        raise UserCodeError(
            "the search space gave no module in any of its trials",
            commonest,
            "let space(trial) return an nn.Module for every choice that it offers",
        )
    if not any(seen):
        raise UserCodeError(
            "the search space varies nothing",
            "space(trial) never asked the trial for a choice",
            "choose with trial.suggest_categorical, trial.suggest_int or trial.suggest_float",
        )
    first = seen[0]
    finite = [(name, options) for name, options in first.items() if options]
    if len(finite) < len(first) or any(other != first for other in seen):
        return ProbedSpace(None, tuple(reasons), calls)
    return ProbedSpace(Space(tuple(Knob(name, options) for name, options in finite)), tuple(reasons), calls)


def module_of(function: Callable[[Any], Any], trial: Any) -> nn.Module:
    """Return the module that a space builds for a trial.

    Raises:
        UserCodeError: it raised, or returned no module.
    """
    try:
        module = function(trial)
    except UserCodeError:
        raise
    except Exception as error:  # the user's code: its failure is the trial's result
        raise UserCodeError("the search space failed", f"{type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise UserCodeError(
            "the search space returned no module",
            f"space(trial) returned {type(module).__name__}",
            "return an nn.Module",
        )
    return module


def build(function: Callable[[Any], Any], configuration: Configuration) -> nn.Module:
    """Return the module of a configuration.

    Raises:
        UserCodeError: the space raised, returned no module, or asks for what the configuration does not have.
    """
    return module_of(function, DrawnTrial(given=configuration))


def _drawn(
    generator: np.random.Generator, low: float, high: float, options: tuple[Option, ...] | None, log: bool
) -> float:
    if options is not None:
        return float(options[int(generator.integers(len(options)))] or 0.0)
    return float(np.exp(generator.uniform(np.log(low), np.log(high))) if log else generator.uniform(low, high))
