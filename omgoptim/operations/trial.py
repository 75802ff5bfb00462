"""One more candidate, made for real and run on the selection samples, for searches that change its parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from omgoptim.errors import OmgoptimError
from omgoptim.measure.launch import Process
from omgoptim.measure.quality import read_outputs
from omgoptim.models.samples import Samples
from omgoptim.operations.candidates import Option, Program
from omgoptim.operations.context import RunContext
from omgoptim.operations.making import Made, make
from omgoptim.operations.screening import Attempt, Yardstick
from omgoptim.operations.subject import Subject

CALIBRATED = ("static", "qat")
"""Schemes with ranges from calibration data, whose layers can be kept in float one by one."""


@dataclass(slots=True)
class Trials:
    """Full evaluations: each a candidate that is saved, opened in a fresh process and run on all selection samples.

    What has been evaluated is not evaluated again. A candidate that cannot be made or run is a recorded failure.
    """

    context: RunContext
    subject: Subject
    program: Program
    calibration: Samples
    yardstick: Yardstick
    seed: int
    deadline: float
    """When no further evaluation begins, by `clock`."""
    clock: Callable[[], float] = time.monotonic
    evaluations: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    longest_s: float = 0.0
    """What one evaluation took at most: another one must fit what is left."""
    known: dict[str, Attempt] = field(default_factory=dict)
    """What has been evaluated, by parameters and engine; may come from another search of the same run."""

    def out_of_time(self) -> bool:
        """Whether another evaluation would likely end after the deadline."""
        return self.clock() + self.longest_s >= self.deadline

    def of(self, option: Option, doing: str) -> Attempt:
        """The candidate of an option, evaluated.

        Args:
            doing: what the progress says.
        """
        key = f"{option.params.model_dump_json()} {option.runtime}"
        if key not in self.known:
            began = self.clock()
            self.context.progress(f"{doing}: evaluation {self.evaluations + 1}", None)
            self.known[key] = self._evaluated(self._unlike_others(option))
            self.longest_s = max(self.longest_s, self.clock() - began)
        return self.known[key]

    def for_other_runtime(self, attempt: Attempt, runtime: str) -> Attempt:
        """The same program on another engine, evaluated too."""
        option = replace(attempt.made.option, runtime=runtime)
        return self._evaluated(option, attempt.made)

    def _evaluated(self, option: Option, twin: Made | None = None) -> Attempt:
        self.evaluations += 1
        made = make(option, self.subject, self.program, self.calibration, self.context, self.seed, twin)
        attempt = Attempt(made, error=made.error)
        self.attempts.append(attempt)
        if made.folder is None:
            return attempt
        target = self.context.work / "trials" / str(len(self.attempts))
        bench = self.subject.bench
        try:
            with Process(
                made.folder, threads=bench.threads, batches={}, cwd=bench.cwd, device=bench.device, reach=bench.reach
            ) as process:
                process.begin_open()
                process.end_open()
                process.run_samples(self.yardstick.inputs, target)
        except OmgoptimError as error:
            attempt.error = error
            return attempt
        self.yardstick.judge(attempt, read_outputs(target))
        return attempt

    def _unlike_others(self, option: Option) -> Option:
        """The option with a name, and so a folder, that no other has."""
        taken = {attempt.made.option.name for attempt in self.attempts}
        number, note = 2, option.note
        while option.name in taken:
            option = replace(option, note=f"{note} (set {number})")
            number += 1
        return option
