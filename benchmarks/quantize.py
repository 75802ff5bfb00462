"""Does `quantize` choose well, and what does choosing cost? Against each engine called by its own API, in one race.

For each model: `omgoptim quantize` as a whole, in a copy of the project; the same engines by hand (`bare_engines.py`);
then everything is an artifact, and all of them race against the eager float32 model on the evaluation data.

    python benchmarks/quantize.py [--models digits_cnn lstm minilm resnet vit] [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from record import bar, console, keep, machine, table

from omgoptim.errors import OmgoptimError
from omgoptim.measure.measuring_process import MeasuringProcess
from omgoptim.measure.metrics import RequestedFunction, resolve_metric
from omgoptim.measure.quality import Quality, compare_quality, read_outputs
from omgoptim.measure.timing import PLANS, Timing, time_artifacts
from omgoptim.models.artifact import save_program
from omgoptim.models.manifest import MANIFEST, PROGRAM, Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.operations.context import RunContext
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.prepare import prepare
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.runtimes import ENGINES, SessionSettings

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its guard, and who it is compared with."""

    name: str
    guard: float
    peers: tuple[str, ...]
    file: str = ""
    """In the project's folder `examples`; default: the name."""

    @property
    def source(self) -> str:
        return f"examples/{self.file or self.name}.py"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine called directly: which step of `bare_engines.py` makes its file, and how it is run."""

    step: str
    runtime: str
    precision: str


@dataclass(frozen=True, slots=True)
class Raced:
    """One contestant's end."""

    name: str
    timing: Timing
    quality: Quality
    size_bytes: int


PEERS = {
    "ONNX Runtime fp32": Peer("float", "onnxruntime", "float32"),
    "ONNX Runtime static": Peer("ort_static", "onnxruntime", "int8"),
    "ONNX Runtime dynamic": Peer("ort_dynamic", "onnxruntime", "int8"),
    "OpenVINO fp32": Peer("float", "openvino", "float32"),
    "OpenVINO bf16": Peer("float", "openvino", "bfloat16"),
    "OpenVINO, NNCF": Peer("nncf_openvino", "openvino", "int8"),
    "OpenVINO, NNCF, bf16 rest": Peer("nncf_openvino", "openvino", "bfloat16"),
}
FLOATS = ("ONNX Runtime fp32", "OpenVINO fp32", "OpenVINO bf16")
NNCF = ("OpenVINO, NNCF", "OpenVINO, NNCF, bf16 rest")
CASES = {
    "digits_cnn": Case("digits_cnn", 0.005, (*FLOATS, *NNCF, "ONNX Runtime static")),
    "lstm": Case("lstm", 0.005, (*FLOATS, *NNCF, "ONNX Runtime static", "ONNX Runtime dynamic")),
    "minilm": Case("minilm", 0.02, (*FLOATS, *NNCF, "ONNX Runtime dynamic")),
    "resnet": Case("resnet", 0.005, (*FLOATS, *NNCF, "ONNX Runtime static"), "quantize_resnet"),
    "vit": Case("vit", 0.005, (*FLOATS, *NNCF, "ONNX Runtime dynamic"), "quantize_vit"),
}
OWN_CASES = ("pruning_nets.py", "quantize_resnet.py", "quantize_vit.py")
"""Files of this folder that stand beside the examples in the project; they train their networks where they lie."""
STEP_OF = {
    "static-onnxruntime": "ort_static",
    "static-nncf": "nncf_onnx",
    "dynamic": "ort_dynamic",
    "bf16": "torch_bf16",
}
"""What a candidate's technique is by hand; fp32 is the export itself."""

AUTO = "omgoptim"

BUILD = (
    "import runpy, sys, os; sys.path.insert(0, os.path.dirname(sys.argv[1])); runpy.run_path(sys.argv[1])['build']()"
)


def timed(command: list[str], log: Path) -> float:
    """Seconds that a process takes from start to end."""
    quiet = {"NNCF_CI": "1", "CI": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}  # no telemetry
    with log.open("a") as output:
        start = time.perf_counter()
        done = subprocess.run(command, stdout=output, stderr=output, env=os.environ | quiet, check=False)
        seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return seconds


def request_of(case: Case, project: Path, quick: bool, seed: int) -> dict[str, Any]:
    return {
        "model": f"{case.source}:build",
        "data": f"{case.source}:load",
        "max_quality_drop": case.guard,
        "timing": "quick" if quick else "standard",
        "seed": seed,
        "project": str(project),
    }


def the_whole_command(case: Case, project: Path, quick: bool, seed: int) -> dict[str, Any]:
    """The answer of `whole_command.py`, with the seconds that its process took."""
    question, answer = project / "request.json", project / "answer.json"
    question.write_text(json.dumps(request_of(case, project, quick, seed)))
    seconds = timed([sys.executable, str(HERE / "whole_command.py"), str(question), str(answer)], project / "whole.log")
    return {"whole_s": seconds, **json.loads(answer.read_text())}


def by_hand(case: Case, project: Path, output: str, steps: list[str]) -> float:
    """Seconds of a process that loads, exports and does `steps`."""
    script = [sys.executable, str(HERE / "bare_engines.py"), str(project), case.source]
    return timed([*script, str(project / output), *steps], project / "bare.log")


def steps_of(report: dict[str, Any]) -> list[str]:
    """By hand, what omgoptim made for its candidates."""
    tried = [c["name"].split(" on ")[0] for c in report["candidates"] if c["status"] != "skipped"]
    return list(dict.fromkeys(STEP_OF[technique] for technique in tried if technique in STEP_OF))


def as_artifact(peer: Peer, made: Path, folder: Path, loaded: LoadedModel) -> Path:
    """A peer's file as an artifact, so that it is opened and timed as any other.

    OpenVINO looks at what a file holds and not at its ending, so its own format takes the ONNX program's place.
    """
    program, weights = made / peer.step / PROGRAM, made / peer.step / "model.bin"
    own_format = program.with_suffix(".xml")
    if own_format.exists() and not program.exists():
        shutil.copy2(own_format, program)
    settings = SessionSettings(loaded.bench.threads, precision=peer.precision)
    outputs = ENGINES[peer.runtime].open(program, loaded.signature, settings).run(loaded.example)
    manifest = replace(Manifest.read(loaded.baseline), runtime=peer.runtime, precision=peer.precision, files={})
    save_program(folder, made / "float" / PROGRAM, manifest, OutputCheck(loaded.example, outputs))
    files = {}
    for file in (program, weights):
        if file.exists():
            shutil.copy2(file, folder / file.name)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(replace(Manifest.read(folder), files=files).to_json(), indent=1))
    return folder


def subject_of(case: Case, project: Path, quick: bool, seed: int) -> LoadedModel:
    request = parse("quantize", request_of(case, project, quick, seed))
    if not isinstance(request, QuantizeRequest):
        raise TypeError("no quantize request")
    return prepare(request, RunContext(project / "race", "race", project, sys.executable, "here", lambda *_: None))


def race_all(case: Case, loaded: LoadedModel, folders: dict[str, Path], quick: bool, seed: int) -> list[Raced]:
    """Everyone in one race, the eager float32 model first; one who fails is told and left out."""
    targets = [loaded.eval_folder.parent / "outputs" / str(index) for index in range(len(folders))]

    def outputs(index: int, process: MeasuringProcess) -> None:
        process.run_samples(loaded.eval_folder, targets[index])

    plan = PLANS["quick" if quick else "standard"]
    timings = time_artifacts(list(folders.values()), loaded.bench, plan, seed, on_first=outputs)
    original, labels = read_outputs(targets[0]), loaded.evaluation.targets
    metric = resolve_metric(RequestedFunction("auto", loaded.policy, 300), loaded.signature, original, labels)
    ended = []
    for (name, folder), timing, target in zip(folders.items(), timings, targets, strict=True):
        if isinstance(timing, OmgoptimError):
            console.print(f"{case.name}, {name} failed: {timing}")
            continue
        quality = compare_quality(metric, original, read_outputs(target), labels, seed)
        ended.append(Raced(name, timing, quality, Manifest.read(folder).size_bytes))
    return ended


def speedup(raced: Raced) -> float:
    return raced.timing.speedup.value if raced.timing.speedup else 1.0


def judged(case: Case, ended: list[Raced], whole: dict[str, Any], bare_s: float) -> list[dict[str, Any]]:
    """The bars of this model. They were set before anything was measured."""
    auto = next((raced for raced in ended if raced.name == AUTO), None)
    if auto is None:
        raise SystemExit(f"{case.name}: omgoptim's own artifact dropped out of the race")
    baseline, *others = ended
    peers = [raced for raced in others if raced is not auto and raced.quality.drop <= case.guard]
    bars = []
    if case.name == "digits_cnn":
        bars.append(
            bar("digits: float weights / artifact, bytes", baseline.size_bytes / auto.size_bytes, 3, at_least=True)
        )
    if case.name == "minilm":
        bars.append(bar("MiniLM: times as fast as eager float32", speedup(auto), 2, at_least=True))
        bars.append(bar("MiniLM: cosine with the original", auto.quality.after, 0.98, at_least=True))
    else:
        bars.append(bar(f"{case.name}: accuracy lost", auto.quality.drop, 0.005, at_least=False))
    if peers:
        best = max(peers, key=speedup)
        what = f"{case.name}: time of auto's choice / best direct peer whose quality holds ({best.name})"
        bars.append(bar(what, speedup(best) / speedup(auto), 1.05, at_least=False))
    cost = (whole["whole_s"] - whole["measuring_s"]) / bare_s
    bars.append(bar(f"{case.name}: whole command less its measuring / bare engines", cost, 1.5, at_least=False))
    return bars


def show(case: Case, ended: list[Raced], whole: dict[str, Any], bare_s: float) -> None:
    chosen = next(c["name"] for c in whole["report"]["candidates"] if c["status"] == "chosen")
    rows = []
    for raced in sorted(ended, key=speedup, reverse=True):
        ratio, name = raced.timing.speedup, f"{AUTO}: {chosen}" if raced.name == AUTO else raced.name
        interval = f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio and ratio.low and ratio.high else "-"
        holds = "yes" if raced.quality.drop <= case.guard else "no"
        quality, size = f"{raced.quality.after:.4f}", f"{raced.size_bytes / 1e6:.2f}"
        latency, batched = raced.timing.latency_ms_p50, raced.timing.throughput_ratio
        rows.append((name, f"{latency:.3f}", f"{speedup(raced):.2f}", interval, batched, size, quality, holds))
    columns = ("", "ms", "speedup", "95 %", "at batch 32", "MB", ended[0].quality.metric, "within the guard")
    table(f"{case.name}, guard {case.guard:g}", columns, rows)
    console.print(
        f"the whole command {whole['whole_s']:.1f} s, of it {whole['measuring_s']:.1f} s measuring and "
        f"{whole['waiting_s']:.1f} s looking at the load; the bare engines {bare_s:.1f} s"
    )


def compare(case: Case, quick: bool, seed: int) -> dict[str, Any]:
    """One model, from the copied project to its bars."""
    with tempfile.TemporaryDirectory(prefix=f"omgoptim-{case.name}-") as scratch:
        project = Path(scratch)
        shutil.copytree(EXAMPLES, project / "examples", ignore=shutil.ignore_patterns("__pycache__"))
        for name in OWN_CASES:
            shutil.copy(HERE / name, project / "examples")
        if case.file:  # its weights are made before anything is timed
            timed([sys.executable, "-c", BUILD, str(project / case.source)], project / "train.log")
        console.print(f"[dim]{case.name}: omgoptim quantize[/]")
        whole = the_whole_command(case, project, quick, seed)
        same = steps_of(whole["report"])
        console.print(f"[dim]{case.name}: by hand {', '.join(same)}[/]")
        bare_s = by_hand(case, project, "same", same)
        peers = {name: PEERS[name] for name in case.peers}
        by_hand(case, project, "peers", sorted({peer.step for peer in peers.values()} - {"float"}))
        loaded = subject_of(case, project, quick, seed)
        folders = {"torch eager fp32": loaded.baseline, AUTO: Path(whole["report"]["artifact"]["path"])}
        for index, (name, peer) in enumerate(peers.items()):
            folders[name] = as_artifact(peer, project / "peers", project / "artifacts" / str(index), loaded)
        console.print(f"[dim]{case.name}: racing {len(folders)}[/]")
        ended = race_all(case, loaded, folders, quick, seed)
    show(case, ended, whole, bare_s)
    return {
        "bars": judged(case, ended, whole, bare_s),
        "contestants": {raced.name: record(raced) for raced in ended},
        "whole": {key: whole[key] for key in ("whole_s", "measuring_s", "waiting_s")} | {"bare_s": bare_s},
        "candidates": whole["report"]["candidates"],
    }


def record(raced: Raced) -> dict[str, Any]:
    timing, quality = raced.timing, raced.quality
    ratio = timing.speedup
    return {
        "latency_ms_p50": timing.latency_ms_p50,
        "speedup": ratio.value if ratio else None,
        "speedup_low": ratio.low if ratio else None,
        "speedup_high": ratio.high if ratio else None,
        "throughput_ratio": timing.throughput_ratio,
        "peak_memory_bytes": timing.peak_memory_bytes,
        "size_bytes": raced.size_bytes,
        quality.metric: quality.after,
        "quality_drop": quality.drop,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="omgoptim quantize against each engine's own API")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run: single launches, no claim")
    asked = parser.parse_args()
    began = machine()
    models = {name: compare(CASES[name], asked.quick, asked.seed) for name in asked.models}
    keep("quantize", asked.seed, asked.quick, began, {"models": models})
    missed = sum(not judged["held"] for model in models.values() for judged in model["bars"])
    console.print(f"{missed} bars missed" if missed else "every bar held")


if __name__ == "__main__":
    main()
