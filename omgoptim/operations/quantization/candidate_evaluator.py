"""Evaluation of additional candidates on the selection samples, for searches over their parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.measure.quality import read_outputs
from omgoptim.operations.quantization.build_candidates import BuiltCandidate, CandidateBuilder
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference

CALIBRATED = ("static", "qat")
"""Schemes with calibrated ranges, whose layers can be kept in float individually."""


@dataclass(slots=True)
class _Evaluator:
    """Process of one engine; `opening` until its first artifact is open."""

    process: MeasuringProcess
    opening: bool = True


class Evaluators:
    """One reusable process per engine, since starting one takes longer than most evaluations.

    A context manager. A process that fails is closed and does not affect the next candidate.
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
        """Start the process of an engine in advance, without waiting for it."""
        if runtime not in self._started:
            process = self._bench.start(folder, {})
            self._started[runtime] = _Evaluator(process)
            process.begin_open()

    def run(self, folder: Path, runtime: str, inputs: Path, target: Path) -> None:
        """Run every batch file of `inputs` through the artifact of `folder` and write the outputs to `target`.

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
            self.run(folder, runtime, inputs, target)  # an earlier artifact may be the cause: retry in a fresh process

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
    """Evaluator that builds, saves and opens candidates and runs them on all selection samples.

    Results are cached. A candidate that cannot be built or run is recorded as failed.
    """

    evaluators: Evaluators
    builder: CandidateBuilder
    screening: ScreeningReference
    deadline: float
    """Time by `clock` after which no evaluation begins."""
    clock: Callable[[], float] = time.monotonic
    evaluations: int = 0
    results: list[CandidateResult] = field(default_factory=list)
    longest_s: float = 0.0
    """Duration of the longest evaluation; the next one must fit into the remaining time."""
    reserved_names: set[str] = field(default_factory=set)
    """Names, and so folders, of candidates built elsewhere."""
    known: dict[str, CandidateResult] = field(default_factory=dict)
    """Results by parameters and engine; may include those of another search of the same run."""

    def out_of_time(self) -> bool:
        """Return whether another evaluation would likely end after the deadline."""
        return self.clock() + self.longest_s >= self.deadline

    def of(self, spec: CandidateSpec, doing: str) -> CandidateResult:
        """Evaluate the candidate of a spec, or return its cached result.

        Args:
            spec: scheme, engine and settings of the candidate.
            doing: progress message.
        """
        key = f"{spec.params.model_dump_json()} {spec.runtime}"
        if key not in self.known:
            began = self.clock()
            self.builder.context.progress(f"{doing}: evaluation {self.evaluations + 1}", None)
            self.known[key] = self._evaluated(self._unique(spec))
            self.longest_s = max(self.longest_s, self.clock() - began)
        return self.known[key]

    def for_other_runtime(self, result: CandidateResult, runtime: str) -> CandidateResult:
        """Evaluate the same program on another engine."""
        spec = self._unique(replace(result.built.spec, runtime=runtime))
        return self._evaluated(spec, result.built)

    def _evaluated(self, spec: CandidateSpec, twin: BuiltCandidate | None = None) -> CandidateResult:
        self.evaluations += 1
        built = self.builder.build(spec, twin, limit_s=max(0.0, self.deadline - self.clock()))
        result = CandidateResult(built, error=built.error)
        self.results.append(result)
        if built.folder is None:
            return result
        target = self.builder.context.work / "trials" / str(len(self.results))
        try:
            self.evaluators.run(built.folder, built.spec.runtime, self.screening.inputs, target)
        except OmgoptimError as error:
            result.error = error
            return result
        self.screening.evaluate(result, read_outputs(target))
        return result

    def _unique(self, spec: CandidateSpec) -> CandidateSpec:
        """Return the spec with a unique name, and so a unique folder."""
        reserved_names = self.reserved_names | {result.name for result in self.results}
        number, note = 2, spec.note
        while spec.name in reserved_names:
            spec = replace(spec, note=f"{note} (set {number})")
            number += 1
        return spec
