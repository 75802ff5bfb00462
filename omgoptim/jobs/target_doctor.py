"""doctor of a target: its processor, memory, Python and engines, and what is missing."""

from __future__ import annotations

from omgoptim.errors import SetupError
from omgoptim.jobs.project import find_project
from omgoptim.measure.target.connection import Connection, TargetLost
from omgoptim.measure.target.machine import ENGINES, REQUIRED, Machine, look_at
from omgoptim.reports import DoctorReport, PackageState
from omgoptim.requests import DoctorRequest
from omgoptim.requests.target import TargetAddress

UNLOCKS = {
    "numpy": "every measurement",
    "onnxruntime": "measuring ONNX programs there, int8 included",
    "openvino": "the OpenVINO engine, often the fastest on x86",
}


def target_doctor(request: DoctorRequest, target: str) -> DoctorReport:
    """Look at a target, or remove what omgoptim has stored there.

    Raises:
        SetupError: it cannot be reached or has no Python; to clean: a run measures there.
    """
    address = TargetAddress.parse(target)
    connection = Connection(address)
    try:
        machine = look_at(connection)
        freed = int(connection.request("clean")["freed_bytes"]) if request.clean else None
    except TargetLost as lost:
        raise SetupError(f"the connection to {address} ended", str(lost), "try again") from None
    finally:
        connection.close()
    packages = [_state(machine, name) for name in UNLOCKS]
    missing = [name for name in REQUIRED if name not in machine.versions]
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
        runtimes=[one for one in packages if one.name in ENGINES],
        extras=[one for one in packages if one.name not in ENGINES],
        project=str(find_project(request.project)),
        mcp_entry={},
    )


def _state(machine: Machine, name: str) -> PackageState:
    version = machine.versions.get(name)
    return PackageState(
        name=name,
        state="missing" if version is None else "ok",
        version=version,
        unlocks=UNLOCKS[name],
        fix=None if version else f"{machine.python} -m pip install {name}  # on the target; else a run does it",
    )
