"""Does distillation keep what a far smaller student would lose? Each part against the same student without its teacher.

digits, animals      R8(24) and a depth-separable net with a twentieth (animals: a thirtieth) of its parameters, learnt
                     from 1,600 images.
tiny                 the digits again, with a thirtieth, and then quantized.
series               a GRU and a smaller one, on recordings of people that neither has seen.
sentences            MiniLM with three of its six layers, from the teacher's answers alone.

Per seed a teacher is trained (once: kept in build/), and `omgoptim.distill` runs whole, with `control`; the first
seed's tiny student is quantized too. Every quality comes from a reopened artifact on the eval split, which chose
nothing.

    python benchmarks/distill.py [--part digits tiny animals series sentences] [--seeds 0 1 2 3 4] [--quick]
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import distill_data
import distill_nets
import torch
from record import bar, console, keep, machine, table

import omgoptim
from omgoptim.hardware import usable_cores

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "build" / "distill-teachers"
PROJECT = ("pruning_nets.py", "distill_nets.py", "distill_data.py", "distill_sentences.py")
"""What a user's project would hold; copied, so that runs and artifacts stay out of the repository."""

SCORED = 3000
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Quantile of Student's t for a two-sided 95 % interval of the mean of so many differences."""


@dataclass(frozen=True, slots=True)
class Part:
    """One teacher, one student, one set: how both learn."""

    name: str
    nets: str
    """`<nets>_teacher` and `<nets>_student` of distill_nets.py."""
    teacher_epochs: int
    teacher_rate: float
    ratio: float
    """Bar: parameters of the teacher over the student's, at least."""
    lost: float | None
    """Bar: points below the teacher, at most, mean over seeds; None: no bar was set."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `omgoptim.distill`."""
    student: str = ""
    """In distill_nets.py; default: `<nets>_student`."""


IMAGES: dict[str, Any] = {"learning_rate": 0.02, "lr_schedule": "one_cycle", "warmup": 0.3}
PARTS = {
    "digits": Part("digits", "images", 20, 3e-3, 20, 0.5, {**IMAGES, "epochs": 40}, "wider_student"),
    "tiny": Part("digits", "images", 20, 3e-3, 20, None, {**IMAGES, "epochs": 40}),
    "animals": Part("animals", "images", 20, 3e-3, 20, None, {**IMAGES, "epochs": 20}),
    "series": Part("watch", "series", 16, 5e-3, 10, 1.0, {**IMAGES, "epochs": 30, "learning_rate": 0.01}),
}
SMALLER = 60
"""Bar: bytes of the teacher's artifact over those of the quantized student's, at least."""

SENTENCES: dict[str, Any] = {
    "student": "fewer_layers",
    "keep_layers": 3,
    "epochs": 8,
    "learning_rate": 4e-4,
    "lr_schedule": "one_cycle",
    "warmup": 0.1,
    "mixed_precision": "bf16",
}
RANKING = 0.95
"""Bar: Spearman's rank correlation with the teacher's similarities, at least."""


@dataclass(frozen=True, slots=True)
class Result:
    """One seed of one part; qualities on the eval split."""

    teacher: float
    distilled: float
    control: float
    params_ratio: float
    size_ratio: float
    speedup: float | None
    agreement: float | None
    teacher_outputs: str | None
    seconds: float

    @property
    def lost(self) -> float:
        """Points below the teacher."""
        return 100 * (self.teacher - self.distilled)

    @property
    def gain(self) -> float:
        """Points above the control."""
        return 100 * (self.distilled - self.control)


@contextmanager
def project() -> Iterator[Path]:
    """A project of its own, which is the current folder meanwhile."""
    before, named = Path.cwd(), os.environ.get("OMGOPTIM_PROJECT")
    with tempfile.TemporaryDirectory(prefix="omgoptim-distill-") as scratch:
        folder = Path(scratch).resolve()
        for name in PROJECT:
            shutil.copy(HERE / name, folder)
        os.chdir(folder)
        os.environ["OMGOPTIM_PROJECT"] = str(folder)
        try:
            yield folder
        finally:
            os.chdir(before)
            os.environ.pop("OMGOPTIM_PROJECT")
            if named is not None:
                os.environ["OMGOPTIM_PROJECT"] = named


def run_seed(part: Part, seed: int, cache: Path, quick: bool) -> tuple[Result, str, dict[str, Any]]:
    """One teacher and `omgoptim.distill` with its control.

    Returns:
        The result, the run's id, and the arguments that name teacher and data.
    """
    started = time.perf_counter()
    make = getattr(distill_nets, f"{part.nets}_teacher")
    epochs = 1 if quick else part.teacher_epochs
    data = getattr(distill_data, part.name)("train")
    weights = distill_nets.taught(make, data, part.name, seed, cache, epochs, part.teacher_rate)
    given = {
        "data": f"distill_data.py:{part.name}",
        "model_kwargs": {"weights": str(weights)},
        "samples": SCORED,
        "max_quality_drop": 1.0,
    }
    student = {
        "student": f"distill_nets.py:{part.student or part.nets + '_student'}",
        "student_kwargs": {"seed": 1000 + seed},
        "control": True,
        "timing": "quick",
        "seed": seed,
    }
    settings = {**part.settings, "epochs": 1} if quick else part.settings
    report = omgoptim.distill(f"distill_nets.py:{part.nets}_teacher", **student, **settings, **given)
    before, after, control, gains = report.before, report.after, report.control, report.gains
    if before is None or after is None or control is None or gains is None or control.gain is None:
        raise SystemExit("the report lacks its numbers")
    alone = control.quality or math.nan
    result = Result(
        teacher=before.quality or math.nan,
        distilled=alone + control.gain,
        control=alone,
        params_ratio=(before.params or 0) / (after.params or 1),
        size_ratio=gains.size_ratio or math.nan,
        speedup=gains.speedup,
        agreement=gains.agreement,
        teacher_outputs=report.training.teacher_outputs if report.training else None,
        seconds=time.perf_counter() - started,
    )
    console.print(
        f"[dim]{part.name}, seed {seed}: teacher {result.teacher:.4f}, distilled {result.distilled:.4f}, "
        f"control {result.control:.4f}, {result.seconds:.0f} s[/]"
    )
    return result, report.run_id, given


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """The mean and the ends of its 95 % interval by Student's t; NaN for the ends of fewer than two."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def run_part(name: str, seeds: list[int], cache: Path, quick: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every seed of a part: its bars, and what is kept."""
    part, results = PARTS[name], []
    bars: list[dict[str, Any]] = []
    kept: dict[str, Any] = {"settings": part.settings}
    with project():
        for seed in seeds:
            result, run_id, given = run_seed(part, seed, cache, quick)
            results.append(result)
            if name == "tiny" and seed == seeds[0]:
                kept["quantized"] = quantized(run_id, given, result)
    rows = [
        (what, *mean_interval([getattr(result, what) for result in results]))
        for what in ("teacher", "distilled", "control", "lost", "gain", "params_ratio", "size_ratio")
    ]
    table(f"{name}, {len(seeds)} seeds", ("", "mean", "low", "high"), rows)
    smallest = min(result.params_ratio for result in results)
    gain, low, _ = mean_interval([result.gain for result in results])
    bars.append(bar(f"{name}: teacher's parameters / student's", smallest, part.ratio, at_least=True))
    if part.lost is not None:
        lost = statistics.fmean(result.lost for result in results)
        bars.append(bar(f"{name}: points below the teacher", lost, part.lost, at_least=False))
    bars.append(bar(f"{name}: points above the control, mean {gain:.2f}, low end", low, 0, at_least=True))
    if "quantized" in kept:
        ratio = kept["quantized"]["size_ratio"]
        bars.append(bar(f"{name}: distilled and quantized, times smaller on disk", ratio, SMALLER, at_least=True))
    kept["seeds"] = {str(seed): asdict(result) for seed, result in zip(seeds, results, strict=True)}
    return bars, kept


def quantized(run_id: str, given: dict[str, Any], distilled: Result) -> dict[str, Any]:
    """The student in int8, a scale per tensor: in so small a net those per channel are a fifth of the file."""
    told = {name: given[name] for name in ("data", "samples", "max_quality_drop")}
    report = omgoptim.quantize(
        run_id, scheme="static", granularity="per_tensor", runtime="onnxruntime", timing="quick", **told
    )
    if report.after is None or report.gains is None or report.before is None or report.artifact is None:
        raise SystemExit("the quantized student's report lacks its numbers")
    console.print(f"[dim]{report.summary}[/]")
    return {
        "quality": report.after.quality,
        "quality_of_the_teacher": distilled.teacher,
        "size_bytes": report.after.size_bytes,
        "files": report.artifact.files,
        "size_ratio": distilled.size_ratio * (report.gains.size_ratio or math.nan),
    }


def run_sentences(quick: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """MiniLM with half of its layers; the metric is Spearman's rank correlation of pairwise similarities."""
    settings = {**SENTENCES, "epochs": 1} if quick else SENTENCES
    with project() as folder:
        shutil.copy(HERE.parent / "examples" / "minilm.py", folder)
        report = omgoptim.distill(
            "distill_sentences.py:teacher",
            data="distill_sentences.py:load",
            metric="distill_sentences.py:ranking",
            max_quality_drop=1.0,
            timing="quick",
            **settings,
        )
    if report.before is None or report.after is None or report.gains is None or report.training is None:
        raise SystemExit("the report lacks its numbers")
    console.print(f"[dim]{report.summary}[/]")
    ranking = report.after.quality or math.nan
    epochs = [(str(epoch.epoch), epoch.loss, epoch.quality, epoch.seconds) for epoch in report.training.epochs]
    table("sentences: by epoch, on calibration sentences", ("epoch", "loss", "ranking", "seconds"), epochs)
    kept = {
        "settings": settings,
        "ranking": ranking,
        "params_before": report.before.params,
        "params_after": report.after.params,
        "speedup": report.gains.speedup,
        "seconds": report.training.seconds,
        "loss": report.training.loss,
        "by_epoch": epochs,
    }
    return [
        bar("sentences: Spearman of similarities, held out, against the teacher", ranking, RANKING, at_least=True)
    ], kept


def main() -> None:
    parser = argparse.ArgumentParser(description="distillation against the same student without its teacher")
    parser.add_argument("--part", nargs="+", choices=(*PARTS, "sentences"), default=[*PARTS, "sentences"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained teachers are kept")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two seeds, one epoch, no claim")
    asked = parser.parse_args()
    seeds = asked.seeds[:2] if asked.quick else asked.seeds
    torch.set_num_threads(usable_cores())
    for name in asked.part:
        began = machine()
        if name == "sentences":
            bars, kept = run_sentences(asked.quick)
        else:
            bars, kept = run_part(name, seeds, asked.cache.resolve(), asked.quick)
        keep(f"distill_{name}", seeds[0], asked.quick, began, {"bars": bars, **kept})


if __name__ == "__main__":
    main()
