"""Is `optimize` better than each verb alone, an engine's own int8, and a script of Torch-Pruning and NNCF?

All have the same guard; the script has the seconds that `optimize` took, and a sweep of ratios of its own. Then
everything is an artifact, and all of them race against the eager float32 model on unread evaluation data.

    python benchmarks/optimize.py [--case digits resnet minilm] [--budget-minutes 5] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize import BUILD, EXAMPLES, HERE, OWN_CASES, Case, Raced, race_all, record, speedup, subject_of, timed
from record import RESULTS, bar, console, keep, machine, table

import omgoptim
from omgoptim.errors import OmgoptimError
from omgoptim.models.artifact import save_program
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.runtimes import ENGINES, SessionSettings

OURS = "optimize"
STRICTLY_FASTER, STRICTLY_SMALLER = 1.02, 1.3
"""Of two of three cases: faster than the best of the others by both, or that much smaller at equal speed."""


@dataclass(frozen=True, slots=True)
class Contest:
    """A case, the minutes of `optimize`, and what it is compared with."""

    case: Case
    minutes: float
    epochs: int
    """Of the verbs that train, alone."""
    defaults: dict[str, tuple[str, str]]
    """Engines' own int8: name to step of `bare_engines.py` and engine."""

    def singles(self) -> dict[str, dict[str, Any]]:
        """Arguments of each verb alone."""
        return {
            "quantize": {},
            "prune": {"pruning_ratio": 0.5, "epochs": self.epochs},
            "factorize": {"epochs": self.epochs},
            "distill": {"student": "narrow", "epochs": self.epochs},
        }


STATIC = {"ONNX Runtime static": ("ort_static", "onnxruntime"), "NNCF on OpenVINO": ("nncf_onnx", "openvino")}
DYNAMIC = {"ONNX Runtime dynamic": ("ort_dynamic", "onnxruntime"), "NNCF on OpenVINO": ("nncf_onnx", "openvino")}
CONTESTS = {
    "digits": Contest(Case("digits_cnn", 0.01, ()), 5, 20, STATIC),
    "resnet": Contest(Case("resnet", 0.01, (), "quantize_resnet"), 10, 8, STATIC),
    "minilm": Contest(Case("minilm", 0.02, ()), 15, 3, DYNAMIC),
}


def program_artifact(folder: Path, program: Path, runtime: str, loaded: LoadedModel) -> Path:
    """A peer's program as an artifact, so that it is opened and timed as any other."""
    outputs = (
        ENGINES[runtime].open(program, loaded.signature, SessionSettings(loaded.bench.threads)).run(loaded.example)
    )
    save_program(folder, program, Manifest(runtime, "int8", loaded.signature), OutputCheck(loaded.example, outputs))
    return folder


def our_artifacts(
    contest: Contest, shared: dict[str, Any], budget: float
) -> tuple[dict[str, Path], float, dict[str, Any]]:
    """The artifacts of optimize and of each verb alone; the seconds and the report of optimize."""
    source = f"{contest.case.source}:build"
    began = time.perf_counter()
    report = omgoptim.optimize(source, budget_minutes=budget, **shared)
    seconds = time.perf_counter() - began
    found = {OURS: report}
    for verb, more in contest.singles().items():
        console.print(f"[dim]{verb} alone[/]")
        try:
            found[f"{verb} alone"] = getattr(omgoptim, verb)(source, **shared, **more)
        except OmgoptimError as error:
            console.print(f"{verb} alone failed: {error}")
    folders = {name: Path(one.artifact.path) for name, one in found.items() if one.artifact}
    return folders, seconds, json.loads(report.model_dump_json())


def peer_artifacts(
    contest: Contest, project: Path, loaded: LoadedModel, seconds: float, seed: int
) -> tuple[dict[str, Path], Any]:
    """The artifacts of the engines' defaults and of the script, on each engine that runs it; what it chose."""
    case = contest.case
    steps = [step for step, _ in contest.defaults.values()]
    hand = [sys.executable, str(HERE / "bare_engines.py"), str(project), case.source, str(project / "hand")]
    timed([*hand, *steps], project / "hand.log")
    script = [sys.executable, str(HERE / "prune_then_quantize.py"), str(project / case.source), str(project / "script")]
    goal = ["--seconds", f"{seconds:.0f}", "--guard", f"{case.guard}", "--seed", str(seed)]
    timed([*script, *goal], project / "script.log")
    programs = {
        name: (project / "hand" / step / "model.onnx", runtime) for name, (step, runtime) in contest.defaults.items()
    }
    for runtime in ("onnxruntime", "openvino"):
        programs[f"script on {runtime}"] = (project / "script" / "model.onnx", runtime)
    folders = {}
    for index, (name, (program, runtime)) in enumerate(programs.items()):
        folders[name] = program_artifact(project / "peers" / str(index), program, runtime, loaded)
    return folders, json.loads((project / "script" / "chosen.json").read_text())


def judged(case: Case, ended: list[Raced]) -> list[dict[str, Any]]:
    """The bars, which were set before anything was measured."""
    ours = next(raced for raced in ended if raced.name == OURS)
    others = within(case, ended, ours)
    bars = [bar(f"{case.name}: quality lost", ours.quality.drop, case.guard, at_least=False)]
    if others:
        best = best_by_both(others)
        fastest, smallest = max(others, key=speedup), min(others, key=lambda raced: raced.size_bytes)
        for what, other in (("best by both", best), ("fastest", fastest)):
            ratio = speedup(ours) / speedup(other)
            bars.append(bar(f"{case.name}: speed over that of the {what} ({other.name})", ratio, 0.98, at_least=True))
        for what, other in (("best by both", best), ("smallest", smallest)):
            ratio = other.size_bytes / ours.size_bytes
            bars.append(bar(f"{case.name}: bytes of the {what} ({other.name}) over ours", ratio, 1.0, at_least=True))
    return bars


def within(case: Case, ended: list[Raced], ours: Raced) -> list[Raced]:
    """Those that the guard allows, without ours and the original."""
    return [raced for raced in ended[1:] if raced is not ours and raced.quality.drop <= case.guard]


def best_by_both(others: list[Raced]) -> Raced:
    return max(others, key=lambda raced: speedup(raced) / raced.size_bytes)


def strictly_better(case: Case, ended: list[Raced]) -> bool:
    """Whether ours is faster than the best of the others, or much smaller at equal speed."""
    ours = next(raced for raced in ended if raced.name == OURS)
    others = within(case, ended, ours)
    if ours.quality.drop > case.guard or not others:
        return False
    best = best_by_both(others)
    faster = speedup(ours) / speedup(best)
    return faster >= STRICTLY_FASTER or (faster >= 0.98 and best.size_bytes / ours.size_bytes >= STRICTLY_SMALLER)


def show(case: Case, ended: list[Raced]) -> None:
    rows = []
    for raced in sorted(ended, key=speedup, reverse=True):
        ratio = raced.timing.speedup
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio and ratio.low and ratio.high else "-"
        holds = "yes" if raced.quality.drop <= case.guard else "no"
        size, quality = f"{raced.size_bytes / 1e3:.1f}", f"{raced.quality.after:.4f}"
        rows.append((raced.name, f"{speedup(raced):.2f}", interval, size, quality, holds))
    table(f"{case.name}, guard {case.guard:g}", ("", "speedup", "95 %", "kB", "quality", "within the guard"), rows)


def expectations(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the speedups that were expected of the steps are from what was measured."""
    errors = [
        abs(step["expected_speedup"] / step["speedup"] - 1)
        for step in steps
        if step.get("expected_speedup") and step.get("speedup")
    ]
    return {"steps": len(errors), "median_error": statistics.median(errors) if errors else None}


def run(contest: Contest, minutes: float, quick: bool, seed: int) -> dict[str, Any]:
    """One case, from the copied project to its bars."""
    case = contest.case
    with tempfile.TemporaryDirectory(prefix=f"omgoptim-optimize-{case.name}-") as scratch:
        project = Path(scratch)
        shutil.copytree(EXAMPLES, project / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        for name in OWN_CASES:
            shutil.copy(HERE / name, project / "examples")
        if case.file:  # its weights are made before anything is timed
            timed([sys.executable, "-c", BUILD, str(project / case.source)], project / "train.log")
        shared = {
            "data": f"{case.source}:load",
            "max_quality_drop": case.guard,
            "timing": "quick" if quick else "standard",
            "seed": seed,
            "project": str(project),
            "progress": False,
        }
        console.print(f"[dim]{case.name}: optimize, {minutes:g} minutes[/]")
        ours, seconds, report = our_artifacts(contest, shared, minutes)
        loaded = subject_of(case, project, quick, seed)
        console.print(f"[dim]{case.name}: engines' own int8, and the script[/]")
        peers, script = peer_artifacts(contest, project, loaded, seconds, seed)
        folders = {"torch eager fp32": loaded.baseline, **ours, **peers}
        console.print(f"[dim]{case.name}: racing {len(folders)}[/]")
        ended = race_all(case, loaded, folders, quick, seed)
    show(case, ended)
    return {
        "budget_minutes": minutes,
        "optimize_s": seconds,
        "bars": judged(case, ended),
        "strictly_better": strictly_better(case, ended),
        "contestants": {raced.name: record(raced) for raced in ended},
        "script": script,
        "summary": report["summary"],
        "expected": expectations(report["steps"]),
        "steps": report["steps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="optimize against single verbs, engines' own int8, and a script")
    parser.add_argument("--case", nargs="+", default=list(CONTESTS), choices=list(CONTESTS))
    parser.add_argument("--budget-minutes", type=float, help="of optimize, and of the script; default: by case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run: single launches, no claim")
    asked = parser.parse_args()
    began = machine()
    for name in asked.case:  # each is kept on its own, so that one can be run again
        contest = CONTESTS[name]
        result = run(contest, asked.budget_minutes or contest.minutes, asked.quick, asked.seed)
        keep(f"optimize_{name}", asked.seed, asked.quick, began, result)
    records = [json.loads(file.read_text()) for name in CONTESTS if (file := result_of(name, asked.quick)).exists()]
    if len(records) == len(CONTESTS):
        better = sum(one["strictly_better"] for one in records)
        bar("cases in which optimize is strictly better than the best of the others", better, 2, at_least=True)


def result_of(name: str, quick: bool) -> Path:
    return RESULTS / f"optimize_{name}{'-quick' if quick else ''}.json"


if __name__ == "__main__":
    main()
