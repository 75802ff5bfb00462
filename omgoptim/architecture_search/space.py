"""A search space of named knobs with a finite list of options each; a configuration is one option of every knob.

Inside, configurations are rows of option indices: int64 arrays of shape [configurations, knobs].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from omgoptim.errors import RequestError, did_you_mean

Option: TypeAlias = str | int | float | bool | None
"""Value of a knob: a type that JSON and Optuna's categorical distribution support."""

Configuration: TypeAlias = Mapping[str, Option]
Indices: TypeAlias = NDArray[np.int64]

ENUMERATED = 20_000
"""Maximum size of a space that is enumerated instead of sampled: a proposal over 16,384 configurations took 0.03 s,
over 262,144 it took 0.6 s (one core, once)."""


@dataclass(frozen=True, slots=True)
class Knob:
    """A categorical choice: its name and its options, in their order where they have one."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Space:
    """A product of knobs.

    Raises:
        RequestError: there is no knob, one has no option, an option occurs twice, or two knobs share a name.
    """

    knobs: tuple[Knob, ...]

    def __post_init__(self) -> None:
        names = [knob.name for knob in self.knobs]
        if not names:
            raise RequestError("the search space has no choices", "nothing in it can be varied")
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise RequestError("two choices of the search space share a name", ", ".join(twice))
        for knob in self.knobs:
            if not knob.options:
                raise RequestError(f"the choice '{knob.name}' has no options", "a choice needs at least one")
            if len({(type(option), option) for option in knob.options}) < len(knob.options):
                raise RequestError(f"the choice '{knob.name}' lists an option twice", repr(knob.options))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of options of each knob."""
        return tuple(len(knob.options) for knob in self.knobs)

    @property
    def size(self) -> int:
        """Number of configurations."""
        size = 1
        for count in self.counts:
            size *= count
        return size

    def configuration(self, row: Indices) -> dict[str, Option]:
        """Return the configuration of a row of indices."""
        return {knob.name: knob.options[index] for knob, index in zip(self.knobs, row.tolist(), strict=True)}

    def row(self, configuration: Configuration) -> Indices:
        """Return a configuration as option indices, shape [knobs].

        Raises:
            RequestError: a knob is missing or unknown, or set to what is none of its options.
        """
        unknown = sorted(set(configuration) - {knob.name for knob in self.knobs})
        if unknown:
            known = did_you_mean(unknown[0], [knob.name for knob in self.knobs])
            raise RequestError(f"the search space has no choice '{unknown[0]}'", known)
        found = []
        for knob in self.knobs:
            given = configuration.get(knob.name)
            same = [index for index, option in enumerate(knob.options) if _same(option, given)]
            if knob.name not in configuration or not same:
                shown = repr(given) if knob.name in configuration else "nothing"
                raise RequestError(f"'{knob.name}' is set to {shown}", f"its options: {list(knob.options)}")
            found.append(same[0])
        return np.array(found, dtype=np.int64)

    def sample(self, count: int, generator: np.random.Generator) -> Indices:
        """Draw up to `count` distinct configurations uniformly; a small space comes whole, in its order."""
        if self.size <= ENUMERATED:
            return self.all_rows
        drawn = np.stack([generator.integers(options, size=count) for options in self.counts], axis=1)
        return np.unique(drawn.astype(np.int64), axis=0)

    @cached_property
    def all_rows(self) -> Indices:
        """Return all configurations, shape [size, knobs]; for a space that is small enough."""
        return np.array(list(itertools.product(*(range(count) for count in self.counts))), dtype=np.int64)

    @property
    def single_changes(self) -> Indices:
        """Return the configuration of all first options, and those that differ from it in one knob."""
        rows = [np.zeros(len(self.knobs), dtype=np.int64)]
        for knob, count in enumerate(self.counts):
            for option in range(1, count):
                row = np.zeros(len(self.knobs), dtype=np.int64)
                row[knob] = option
                rows.append(row)
        return np.array(rows)

    def one_hot(self, rows: Indices) -> NDArray[np.float64]:
        """Encode rows as indicators of every option but a knob's first, shape [configurations, features]."""
        columns = [rows[:, [knob]] == np.arange(1, count) for knob, count in enumerate(self.counts)]
        return np.concatenate(columns, axis=1).astype(np.float64)

    def mutants(self, row: Indices) -> Indices:
        """List all configurations that differ from a row in one knob, or by two knobs' indices exchanged."""
        found = []
        for knob, count in enumerate(self.counts):
            for option in range(count):
                if option != row[knob]:
                    changed = row.copy()
                    changed[knob] = option
                    found.append(changed)
        for first, second in itertools.combinations(range(len(self.counts)), 2):
            one, other = int(row[first]), int(row[second])
            if one != other and other < self.counts[first] and one < self.counts[second]:
                changed = row.copy()
                changed[first], changed[second] = other, one
                found.append(changed)
        if not found:
            return np.empty((0, len(self.counts)), dtype=np.int64)
        return np.unique(np.array(found, dtype=np.int64), axis=0)


def _same(option: Option, given: Option) -> bool:
    """Return True if two options are equal and of the same type: True is not 1."""
    return type(option) is type(given) and option == given
