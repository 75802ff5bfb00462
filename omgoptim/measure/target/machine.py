"""Inspection of a target, and installation of engines there. No torch, no numpy."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omgoptim.errors import OmgoptimError, SetupError
from omgoptim.measure.target.connection import Connection
from omgoptim.measure.target.package import installed_version, pack_installed, platform_key
from omgoptim.models.security.file_integrity import sha256

REQUIRED = ("numpy", "onnxruntime")
ENGINES = ("onnxruntime", "openvino")
NEEDED = {"numpy": "2.0", "onnxruntime": "1.22", "openvino": "2025.2"}
"""Oldest versions, as in this package's own requirements."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware, Python and importable packages of a target."""

    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    uname: str
    python: str
    python_version: str
    cache: str
    cache_bytes: int
    versions: dict[str, str]
    """numpy and the engines that are there."""

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that can be measured there."""
        return tuple(name for name in ENGINES if name in self.versions)


def packages_folder() -> str:
    """Return the name of the folder of packages for this version of the requirements."""
    wanted = {name: installed_version(name) for name in NEEDED}
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]


def describe_machine(connection: Connection) -> Machine:
    """Describe a target without changing it."""
    return _machine(connection.request("machine"), _versions(connection))


def prepare_machine(connection: Connection, runtime: str) -> tuple[Machine, list[str]]:
    """Describe a target, and install numpy and the engine of a run in its cache folder where they are missing.

    First by its own pip; without a network, by copying them from this Python, where the platform fits.

    Args:
        connection: to the target.
        runtime: the engine of the run, or auto: all that this Python has.

    Returns:
        The machine, and notes on engines that it lacks.

    Raises:
        SetupError: it lacks a package and there is no way to give it.
    """
    record = connection.request("machine")
    found = _versions(connection)
    engines = [name for name in ENGINES if runtime in ("auto", name) and installed_version(name)]
    wanted = list(dict.fromkeys([*REQUIRED, *engines] if runtime == "auto" else ["numpy", *engines]))
    needed = list(REQUIRED) if runtime == "auto" else wanted
    if any(found.get(name) is None for name in wanted):
        problem = _install(connection, record, wanted)
        if problem and wanted != needed and any(found.get(name) is None for name in needed):
            problem = _install(connection, record, needed)
        found = _versions(connection, imported=True)
        missing = [name for name in needed if found.get(name) is None]
        if missing:
            python = record["python"]
            raise SetupError(
                f"{connection.address} lacks {' and '.join(missing)}",
                f"{record['uname']}, Python {record['python_version']}: {problem or 'the import failed'}",
                f"run on the target: {python} -m pip install {' '.join(missing)}",
            )
    notes = [
        f"{name} was not measured: it is not installed on {connection.address}, and installing it failed"
        for name in engines
        if found.get(name) is None
    ]
    return _machine(record, found), notes


def _versions(connection: Connection, *, imported: bool = False) -> dict[str, str | None]:
    names = list(NEEDED)
    found = connection.request("packages", names=names, wanted=packages_folder(), imported=imported)["versions"]
    return {name: found.get(name) for name in NEEDED}


def _machine(record: dict[str, Any], found: dict[str, str | None]) -> Machine:
    return Machine(
        cpu=str(record["cpu"]),
        cpu_features=tuple(record["cpu_features"]),
        cores=int(record["cores"]),
        memory_bytes=record["memory_bytes"],
        uname=str(record["uname"]),
        python=str(record["python"]),
        python_version=str(record["python_version"]),
        cache=str(record["cache"]),
        cache_bytes=int(record["cache_bytes"]),
        versions={name: version for name, version in found.items() if version},
    )


def _install(connection: Connection, record: dict[str, Any], names: list[str]) -> str | None:
    """Install packages on the target; return the reason of a failure, else None."""
    exact = [f"{name}=={version}" for name in names if (version := installed_version(name))]
    oldest = [f"{name}>={NEEDED[name]}" for name in names]
    failed = connection.request("install", requirements=[exact, oldest], wanted=packages_folder())["failed"]
    if failed is None:
        return None
    here, there = platform_key(), [*record["platform"], ".".join(record["python_version"].split(".")[:2])]
    if here != there:
        return f"pip on the target: {failed}; packages here are for {' '.join(here)}, the target is {' '.join(there)}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "packages.tar"
            pack_installed(names, archive)
            digest = sha256(archive)
            connection.request("put", archive, digest=digest)
            connection.request("unpack", digest=digest, wanted=packages_folder())
    except (OmgoptimError, OSError) as error:
        return f"pip on the target: {failed}; copying from this machine: {error}"
    return None
