"""Check of this machine, the project's Python and a target: usable engines, and how to install missing ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from omgoptim.bootstrap import PACKAGE_FILE
from omgoptim.errors import SetupError
from omgoptim.hardware import cpu_features, cpu_name, usable_cores
from omgoptim.jobs.interpreter import (
    OLDEST,
    REQUIRED,
    Interpreter,
    clean_environment,
    find_interpreter,
    is_new_enough,
)
from omgoptim.jobs.project import find_project
from omgoptim.measure.target import machine as target_machine
from omgoptim.measure.target.connection import Connection, TargetLost
from omgoptim.reports import DoctorReport, PackageState
from omgoptim.requests import DoctorRequest
from omgoptim.requests.base import TargetAddress
from omgoptim.text import clean

INSPECT_LIMIT_S = 180.0
"""Time limit for importing all packages of a Python, torch among them. Chosen: a first import on a slow disk takes a
minute."""

INSPECT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; "
    "import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
)
"""The working directory leaves the path before anything is imported: it is the project."""

ENGINES = {
    "onnxruntime": "running ONNX programs, int8 included",
    "openvino": "the OpenVINO engine, often the fastest",
    "executorch": "programs for Android and iOS: runtime executorch",
    "tensorrt": "the TensorRT engine on NVIDIA GPUs, with onnxruntime-gpu",
}
EXTRAS = {
    "nncf": "static quantization with NNCF, which keeps more quality on transformers and depthwise convolutions",
    "transformers": "models from Hugging Face: hf:FOLDER",
    "timm": "models from timm: timm:NAME",
    "torchvision": "models from torchvision: torchvision:NAME",
    "torchmetrics": "torchmetrics names as metric",
    "peft": "LoRA on models of transformers, by PEFT",
    "optuna": "search with Optuna's samplers",
    "ray": "independent work and training on Ray: on ray",
    "coremltools": "export to Core ML",
}
INSTALLED_WITH = {"executorch": ("executorch", "torchao", "ruamel.yaml", "flatbuffers", "tabulate")}
"""Packages to install beside one whose own requirements were left out (docs/devices.md)."""
TORCHVISION_DEPENDENTS = ("torchmetrics", "transformers", "timm", "peft")
"""Packages that import torchvision where it is installed, and so break when it is broken."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """Packages, compiler and devices of a Python, as it reported them."""

    packages: dict[str, dict[str, str | None]]
    compiler: dict[str, str | None]
    cuda_devices: list[str]
    crash: str | None = None
    """Exit status and log, if importing all packages crashed the Python."""


def doctor(request: DoctorRequest) -> DoctorReport:
    """Inspect this machine and the Python that would run the project's models.

    Raises:
        RequestError: the project folder does not exist.
        SetupError: there is no Python where one was named, or it does not run; or the target cannot be used.
    """
    if request.target is not None:
        return target_doctor(request, request.target)
    project = find_project(request.project)
    interpreter = find_interpreter(project, request.python)
    inspection = _inspect(interpreter, project)
    runtimes = _runtimes(interpreter, inspection)
    extras = [_state(interpreter, inspection, name, unlocks) for name, unlocks in EXTRAS.items()]
    lacking = [_state(interpreter, inspection, name, "every run") for name in _unusable(interpreter, inspection)]
    needed = [runtime for runtime in runtimes if runtime.name in ("torch_eager", "onnxruntime")]
    ready = is_new_enough(interpreter) and not lacking and all(runtime.state == "ok" for runtime in needed)
    return DoctorReport(
        outcome="ok" if ready else "incomplete",
        summary=_summary(interpreter, inspection, runtimes, extras),
        python=str(interpreter.path),
        python_found_by=interpreter.found_by,
        python_version=interpreter.version,
        cpu=cpu_name(),
        cpu_features=cpu_features(),
        cores=usable_cores(),
        gpu=", ".join(inspection.cuda_devices) or None,
        runtimes=runtimes,
        extras=lacking + extras,
        project=str(project),
        mcp_entry=mcp_entry(project),
    )


def mcp_entry(project: Path) -> dict[str, Any]:
    """Return the entry to paste into an MCP client's configuration."""
    script = Path(sys.executable).with_name("omgoptim-mcp.exe" if sys.platform == "win32" else "omgoptim-mcp")
    environment = {"OMGOPTIM_PROJECT": str(project)}
    if script.is_file():
        entry = {"command": str(script), "args": []}
    else:
        entry = {"command": sys.executable, "args": ["-m", "omgoptim.server"]}
        if not _is_installed():
            environment["PYTHONPATH"] = str(PACKAGE_FILE.parent.parent)
    return {"mcpServers": {"omgoptim": {**entry, "env": environment}}}


def _is_installed() -> bool:
    try:
        metadata.version("omgoptim")
    except metadata.PackageNotFoundError:
        return False
    return True


def _inspect(interpreter: Interpreter, project: Path) -> Inspection:
    """Query the packages of a Python; if importing them crashes it, query again without imports."""
    answer = _ask(interpreter, project)
    crash = None
    if not answer.stdout:
        log = clean(answer.stderr.decode("utf-8", errors="replace"), 500)
        crash = f"exit status {answer.returncode}: {log}"
        answer = _ask(interpreter, project, "--no-imports")
    try:
        found = json.loads(answer.stdout)
    except ValueError:
        raise SetupError(
            f"the Python at {interpreter.path} did not report its packages", crash or "", "repair that environment"
        ) from None
    return Inspection(found["packages"], found["compiler"], found["cuda_devices"], crash)


def _ask(interpreter: Interpreter, project: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    script = PACKAGE_FILE.parent / "operations" / "inspect_python.py"
    command = [str(interpreter.path), "-c", INSPECT, str(script), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, cwd=project, env=clean_environment(),
            timeout=INSPECT_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, b"", b"importing its packages took too long")


def _unusable(interpreter: Interpreter, inspection: Inspection) -> list[str]:
    """Return the required packages that are missing or broken; torch and onnxruntime are listed as runtimes."""
    states = inspection.packages
    broken = [name for name in REQUIRED if states.get(name, {}).get("state") == "broken"]
    needed = dict.fromkeys([*interpreter.missing, *broken])
    return [name for name in needed if name not in ("torch", "onnxruntime")]


def _runtimes(interpreter: Interpreter, inspection: Inspection) -> list[PackageState]:
    eager = _state(interpreter, inspection, "torch", "running any torch module", shown="torch_eager")
    compiled = _state(interpreter, inspection, "torch", "torch modules with fused kernels", shown="torch_compile")
    problem = inspection.compiler["error"]
    if compiled.state == "ok" and problem is not None:
        advice = "install g++ or clang" if inspection.compiler["path"] is None else "install this Python's -dev package"
        compiled = compiled.model_copy(
            update={"state": "missing", "unlocks": f"{compiled.unlocks}. Not usable: {problem}", "fix": advice}
        )
    shown = [name for name in ENGINES if name != "tensorrt" or inspection.cuda_devices]
    return [eager, compiled, *(_state(interpreter, inspection, name, ENGINES[name]) for name in shown)]


def _state(
    interpreter: Interpreter, inspection: Inspection, name: str, unlocks: str, shown: str | None = None
) -> PackageState:
    found = inspection.packages.get(name, {"state": "missing", "version": None, "error": None})
    state, fix = found["state"], None
    if state == "missing":
        fix = interpreter.install_command(*INSTALLED_WITH.get(name, (name,)))
    elif state == "broken":
        fix = _repair(interpreter, inspection, name)
        unlocks = f"{unlocks}. Broken: {clean(found['error'] or '', 400)}"
        if name == "torchvision":
            unlocks += f". While it is installed, {', '.join(TORCHVISION_DEPENDENTS)} can break with it"
    return PackageState.model_validate(
        {"name": shown or name, "state": state, "version": found["version"], "unlocks": unlocks, "fix": fix}
    )


def _repair(interpreter: Interpreter, inspection: Inspection, name: str) -> str:
    vision_is_broken = inspection.packages["torchvision"]["state"] == "broken"
    if vision_is_broken and name in ("torchvision", *TORCHVISION_DEPENDENTS):
        return interpreter.uninstall_command("torchvision") + "  # or install the build made for this torch"
    return interpreter.install_command("--force-reinstall", "--no-deps", name)


def _summary(
    interpreter: Interpreter,
    inspection: Inspection,
    runtimes: list[PackageState],
    extras: list[PackageState],
) -> str:
    usable = [runtime.name for runtime in runtimes if runtime.state == "ok"]
    engines = f"Engines: {', '.join(usable)}." if usable else "No engine can be used."
    broken = [extra.name for extra in extras if extra.state == "broken"]
    parts = []
    if not is_new_enough(interpreter):
        parts.append(f"Python {interpreter.version} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed.")
    absent = list(interpreter.missing)
    unusable = [package for package in REQUIRED if inspection.packages.get(package, {}).get("state") == "broken"]
    if interpreter.to_create:
        command = interpreter.install_command(*absent)
        parts.append(f"Runs cannot start: the project has no Python environment. Make one with `{command}`.")
    elif absent:
        command = interpreter.install_command(*absent)
        parts.append(f"Runs cannot start: missing {', '.join(absent)}. Install with `{command}`.")
    if unusable:
        parts.append(f"Runs cannot start: broken {', '.join(unusable)}.")
    parts = parts or ["Runs can start."]
    parts.append(engines)
    if broken:
        parts.append(f"Broken: {', '.join(broken)}.")
    if inspection.packages["torchvision"]["state"] == "broken":
        parts.append(
            f"The broken torchvision also breaks packages that import it: {', '.join(TORCHVISION_DEPENDENTS)}."
        )
    if inspection.crash:
        parts.append(f"Importing its packages crashed this Python ({inspection.crash}); states are by file only.")
    return " ".join(parts)


TARGET_UNLOCKS = {
    "numpy": "every measurement",
    "onnxruntime": "measuring ONNX programs there, int8 included",
    "openvino": "the OpenVINO engine, often the fastest on x86",
}


def target_doctor(request: DoctorRequest, target: str) -> DoctorReport:
    """Inspect a target, or remove omgoptim's files there.

    Raises:
        SetupError: it cannot be reached or has no Python; to clean: a run measures there.
    """
    address = TargetAddress.parse(target)
    connection = Connection(address)
    try:
        machine = target_machine.describe_machine(connection)
        freed = int(connection.request("clean")["freed_bytes"]) if request.clean else None
    except TargetLost as lost:
        fix = f"check that `ssh {address.login}` connects, then run doctor again"
        raise SetupError(f"the connection to {address} ended", str(lost), fix) from None
    finally:
        connection.close()
    packages = [_target_state(machine, name) for name in TARGET_UNLOCKS]
    missing = [name for name in target_machine.REQUIRED if name not in machine.versions]
    engines = f"Engines: {', '.join(machine.engines) or 'none'}."
    ready = "Runs can measure there."
    if missing:
        ready = f"It lacks {' and '.join(missing)}; the first run installs them into its cache folder."
    stored = f"omgoptim stores {machine.cache_bytes / 1e6:.0f} MB there, in {machine.cache}."
    if freed is not None:
        stored = f"Removed {freed / 1e6:.0f} MB from {machine.cache}."
    return DoctorReport(
        outcome="incomplete" if missing else "ok",
        summary=f"{address} answers ({machine.uname}). {ready} {engines} {stored}",
        python=machine.python,
        python_found_by="the target's PATH",
        python_version=machine.python_version,
        cpu=machine.cpu,
        cpu_features=list(machine.cpu_features),
        cores=machine.cores,
        gpu=None,
        target=str(address),
        memory_bytes=machine.memory_bytes,
        runtimes=[one for one in packages if one.name in target_machine.ENGINES],
        extras=[one for one in packages if one.name not in target_machine.ENGINES],
        project=str(find_project(request.project)),
        mcp_entry={},
    )


def _target_state(machine: target_machine.Machine, name: str) -> PackageState:
    version = machine.versions.get(name)
    return PackageState(
        name=name,
        state="missing" if version is None else "ok",
        version=version,
        unlocks=TARGET_UNLOCKS[name],
        fix=None if version else f"{machine.python} -m pip install {name}  # on the target; else a run does it",
    )
