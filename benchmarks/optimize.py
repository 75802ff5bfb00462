"""Is `optimize` better than each verb alone, an engine's own int8, and a script of Torch-Pruning and NNCF?

All have the same guard; the script has the seconds that `optimize` took, and a sweep of ratios of its own. Then
everything is an artifact, and all of them race against the eager float32 model on unread evaluation data.

    python benchmarks/optimize.py [--budget-minutes 5] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quantize import EXAMPLES, HERE, Case, Raced, race_all, record, speedup, subject_of, timed
from record import bar, console, keep, machine, table

import omgoptim
from omgoptim.errors import OmgoptimError
from omgoptim.models.artifact import Manifest, OutputCheck, save_program
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.runtimes import ENGINES, SessionSettings

CASE = Case("digits_cnn", 0.01, ())
OURS = "optimize"
EPOCHS = 20
"""Of the verbs that train, alone."""

SINGLES: dict[str, dict[str, Any]] = {
    "quantize": {},
    "prune": {"pruning_ratio": 0.5, "epochs": EPOCHS},
    "factorize": {"epochs": EPOCHS},
    "distill": {"student": "narrow", "epochs": EPOCHS},
}
DEFAULTS = {"ONNX Runtime static": ("ort_static", "onnxruntime"), "NNCF on OpenVINO": ("nncf_onnx", "openvino")}


def program_artifact(folder: Path, program: Path, runtime: str, loaded: LoadedModel) -> Path:
    """A peer's program as an artifact, so that it is opened and timed as any other."""
    outputs = (
        ENGINES[runtime].open(program, loaded.signature, SessionSettings(loaded.bench.threads)).run(loaded.example)
    )
    save_program(folder, program, Manifest(runtime, "int8", loaded.signature), OutputCheck(loaded.example, outputs))
    return folder


def our_artifacts(shared: dict[str, Any], budget: float) -> tuple[dict[str, Path], float, dict[str, Any]]:
    """The artifacts of optimize and of each verb alone; the seconds and the report of optimize."""
    source = f"{CASE.source}:build"
    began = time.perf_counter()
    report = omgoptim.optimize(source, budget_minutes=budget, **shared)
    seconds = time.perf_counter() - began
    found = {OURS: report}
    for verb, more in SINGLES.items():
        console.print(f"[dim]{verb} alone[/]")
        try:
            found[f"{verb} alone"] = getattr(omgoptim, verb)(source, **shared, **more)
        except OmgoptimError as error:
            console.print(f"{verb} alone failed: {error}")
    folders = {name: Path(one.artifact.path) for name, one in found.items() if one.artifact}
    return folders, seconds, json.loads(report.model_dump_json())


def peer_artifacts(project: Path, loaded: LoadedModel, seconds: float, seed: int) -> tuple[dict[str, Path], Any]:
    """The artifacts of the engines' defaults and of the script, on each engine that runs it; what it chose."""
    steps = [step for step, _ in DEFAULTS.values()]
    hand = [sys.executable, str(HERE / "bare_engines.py"), str(project), CASE.source, str(project / "hand")]
    timed([*hand, *steps], project / "hand.log")
    script = [sys.executable, str(HERE / "prune_then_quantize.py"), str(project / CASE.source), str(project / "script")]
    goal = ["--seconds", f"{seconds:.0f}", "--guard", f"{CASE.guard}", "--seed", str(seed)]
    timed([*script, *goal], project / "script.log")
    programs = {name: (project / "hand" / step / "model.onnx", runtime) for name, (step, runtime) in DEFAULTS.items()}
    for runtime in ("onnxruntime", "openvino"):
        programs[f"script on {runtime}"] = (project / "script" / "model.onnx", runtime)
    folders = {}
    for index, (name, (program, runtime)) in enumerate(programs.items()):
        folders[name] = program_artifact(project / "peers" / str(index), program, runtime, loaded)
    return folders, json.loads((project / "script" / "chosen.json").read_text())


def judged(ended: list[Raced]) -> list[dict[str, Any]]:
    """The bars, which were set before anything was measured."""
    ours = next(raced for raced in ended if raced.name == OURS)
    others = [raced for raced in ended[1:] if raced is not ours and raced.quality.drop <= CASE.guard]
    bars = [bar("digits: accuracy lost", ours.quality.drop, CASE.guard, at_least=False)]
    if others:
        best = max(others, key=lambda raced: speedup(raced) / raced.size_bytes)
        fastest, smallest = max(others, key=speedup), min(others, key=lambda raced: raced.size_bytes)
        for what, other in (("best by both", best), ("fastest", fastest)):
            ratio = speedup(ours) / speedup(other)
            bars.append(bar(f"digits: speed over that of the {what} ({other.name})", ratio, 0.98, at_least=True))
        for what, other in (("best by both", best), ("smallest", smallest)):
            ratio = other.size_bytes / ours.size_bytes
            bars.append(bar(f"digits: bytes of the {what} ({other.name}) over ours", ratio, 1.0, at_least=True))
    return bars


def show(ended: list[Raced]) -> None:
    rows = []
    for raced in sorted(ended, key=speedup, reverse=True):
        ratio = raced.timing.speedup
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio and ratio.low and ratio.high else "-"
        holds = "yes" if raced.quality.drop <= CASE.guard else "no"
        size, quality = f"{raced.size_bytes / 1e3:.1f}", f"{raced.quality.after:.4f}"
        rows.append((raced.name, f"{speedup(raced):.2f}", interval, size, quality, holds))
    table(f"{CASE.name}, guard {CASE.guard:g}", ("", "speedup", "95 %", "kB", "quality", "within the guard"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="optimize against single verbs, engines' own int8, and a script")
    parser.add_argument("--budget-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run: single launches, no claim")
    asked = parser.parse_args()
    began = machine()
    with tempfile.TemporaryDirectory(prefix="omgoptim-optimize-") as scratch:
        project = Path(scratch)
        shutil.copytree(EXAMPLES, project / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        shared = {
            "data": f"{CASE.source}:load",
            "max_quality_drop": CASE.guard,
            "timing": "quick" if asked.quick else "standard",
            "seed": asked.seed,
            "project": str(project),
            "progress": False,
        }
        ours, seconds, report = our_artifacts(shared, asked.budget_minutes)
        loaded = subject_of(CASE, project, asked.quick, asked.seed)
        peers, script = peer_artifacts(project, loaded, seconds, asked.seed)
        folders = {"torch eager fp32": loaded.baseline, **ours, **peers}
        console.print(f"[dim]racing {len(folders)}[/]")
        ended = race_all(CASE, loaded, folders, asked.quick, asked.seed)
    show(ended)
    result = {
        "budget_minutes": asked.budget_minutes,
        "optimize_s": seconds,
        "bars": judged(ended),
        "contestants": {raced.name: record(raced) for raced in ended},
        "script": script,
        "summary": report["summary"],
        "steps": report["steps"],
    }
    keep("optimize", asked.seed, asked.quick, began, result)


if __name__ == "__main__":
    main()
