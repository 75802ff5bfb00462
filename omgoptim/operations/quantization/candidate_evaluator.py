"""One more candidate, made for real and run on the selection samples, for searches that change its parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.quality import read_outputs
from omgoptim.measure.timing import TimingSetup
from omgoptim.models.samples import Samples
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.build_candidates import BuiltCandidate, make
from omgoptim.operations.quantization.candidates import Option, Program
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference

CALIBRATED = ("static", "qat")
"""Schemes with ranges from calibration data, whose layers can be kept in float one by one."""


@dataclass(slots=True)
class _Evaluator:
    """The process of one engine; `opening` until its first artifact is known to be open."""

    process: MeasuringProcess
    opening: bool = True


class Evaluators:
    """One process per engine that runs candidate after candidate: starting one takes longer than most evaluations.

    A context manager. A process that fails is closed, so that no candidate suffers from the one before it.
    """

    def __init__(self, bench: TimingSetup) -> None:
        self._bench = bench
        self._started: dict[str, _Evaluator] = {}

    def __enter__(self) -> Evaluators:
        return self

    def __exit__(self, *_: object) -> None:
        for runtime in list(self._started):
            self._close(runtime)

    def begin(self, folder: Path, runtime: str) -> None:
        """Start the process of an engine ahead of its first use, without waiting for it."""
        if runtime not in self._started:
            bench = self._bench
            process = MeasuringProcess(
                folder, threads=bench.threads, batches={}, cwd=bench.cwd, device=bench.device, policy=bench.policy
            )
            self._started[runtime] = _Evaluator(process)
            process.begin_open()

    def run(self, folder: Path, runtime: str, inputs: Path, target: Path) -> None:
        """Run every batch file of `inputs` through the artifact of `folder` and write what it gives to `target`.

        Raises:
            OmgoptimError: the artifact does not open or run.
        """
        used = runtime in self._started
        try:
            self._open(folder, runtime)
            self._started[runtime].process.run_samples(inputs, target)
        except OmgoptimError:
            self._close(runtime)
            if not used:
                raise
            self.run(folder, runtime, inputs, target)  # what came before may be to blame: once more, in a fresh one

    def _open(self, folder: Path, runtime: str) -> None:
        self.begin(folder, runtime)
        evaluator = self._started[runtime]
        if evaluator.opening:
            evaluator.process.end_open()
            evaluator.opening = False
        if evaluator.process.artifact != folder:
            evaluator.process.open_another(folder)

    def _close(self, runtime: str) -> None:
        evaluator = self._started.pop(runtime, None)
        if evaluator is not None:
            evaluator.process.close()


@dataclass(slots=True)
class CandidateEvaluator:
    """Full evaluations: each a candidate that is saved, opened and run on all selection samples.

    What has been evaluated is not evaluated again. A candidate that cannot be made or run is a recorded failure.
    """

    evaluators: Evaluators

    context: RunContext
    loaded: LoadedModel
    program: Program
    calibration: Samples
    screening: ScreeningReference
    seed: int
    deadline: float
    """When no further evaluation begins, by `clock`."""
    clock: Callable[[], float] = time.monotonic
    evaluations: int = 0
    results: list[CandidateResult] = field(default_factory=list)
    longest_s: float = 0.0
    """What one evaluation took at most: another one must fit what is left."""
    taken: set[str] = field(default_factory=set)
    """Names of candidates that were made elsewhere: their folders are taken."""
    known: dict[str, CandidateResult] = field(default_factory=dict)
    """What has been evaluated, by parameters and engine; may come from another search of the same run."""

    def out_of_time(self) -> bool:
        """Whether another evaluation would likely end after the deadline."""
        return self.clock() + self.longest_s >= self.deadline

    def of(self, option: Option, doing: str) -> CandidateResult:
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

    def for_other_runtime(self, result: CandidateResult, runtime: str) -> CandidateResult:
        """The same program on another engine, evaluated too."""
        option = self._unlike_others(replace(result.made.option, runtime=runtime))
        return self._evaluated(option, result.made)

    def _evaluated(self, option: Option, twin: BuiltCandidate | None = None) -> CandidateResult:
        self.evaluations += 1
        made = make(option, self.loaded, self.program, self.calibration, self.context, self.seed, twin)
        result = CandidateResult(made, error=made.error)
        self.results.append(result)
        if made.folder is None:
            return result
        target = self.context.work / "trials" / str(len(self.results))
        try:
            self.evaluators.run(made.folder, made.option.runtime, self.screening.inputs, target)
        except OmgoptimError as error:
            result.error = error
            return result
        self.screening.judge(result, read_outputs(target))
        return result

    def _unlike_others(self, option: Option) -> Option:
        """The option with a name, and so a folder, that no other has."""
        taken = self.taken | {result.made.option.name for result in self.results}
        number, note = 2, option.note
        while option.name in taken:
            option = replace(option, note=f"{note} (set {number})")
            number += 1
        return option
