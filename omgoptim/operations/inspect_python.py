"""Inspection of a Python environment: print its packages and devices as one JSON object.

Uses the standard library only and is run as a file, so that it works in a Python that lacks everything else.
Every package is really imported: one that is installed and does not import is worse than one that is missing.
With the argument `--no-imports` it only looks for the files, for a Python that an import crashes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
from importlib import metadata

PACKAGES = (
    "numpy", "pydantic", "safetensors", "typing_extensions", "filelock", "psutil", "sympy", "onnx", "onnxscript",
    "onnxruntime", "openvino", "torch", "thop", "torchvision", "torchmetrics", "transformers", "timm", "nncf",
    "peft", "optuna", "ray", "executorch", "coremltools", "tensorrt",
)  # fmt: skip

MODULES = {"executorch": ("executorch.extension.pybindings._C", "torchao", "ruamel.yaml", "flatbuffers", "tabulate")}
"""Parts to look for where a package is not usable alone: the first is imported."""

DISTRIBUTIONS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
                 "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")}  # fmt: skip
"""Names that a package goes by where it is installed, if not its own."""

LAZY = {"transformers": "AutoModel"}
"""Packages that import their parts on access, with a part to access."""


def main() -> None:
    """Print the packages of this Python; output of imports goes to standard error."""
    answer = os.dup(1)
    os.dup2(2, 1)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # openvino and nncf report usage without asking
    with_imports = "--no-imports" not in sys.argv
    packages = {name: inspect_package(name, with_imports) for name in PACKAGES}
    found = {
        "python": "{}.{}.{}".format(*sys.version_info[:3]),
        "packages": packages,
        "compiler": compiler(),
        "cuda_devices": cuda_devices() if with_imports and packages["torch"]["state"] == "ok" else [],
    }
    os.write(answer, json.dumps(found).encode())


def inspect_package(name: str, with_import: bool) -> dict[str, str | None]:
    """`state` (ok, missing or broken), `version`, and the `error` of a broken one."""
    if not all(map(_is_found, MODULES.get(name, (name,)))):
        return {"state": "missing", "version": None, "error": None}
    error = _import_error(name) if with_import else None
    return {"state": "broken" if error else "ok", "version": _version(name), "error": error}


def compiler() -> dict[str, str | None]:
    """The C++ compiler that torch.compile would use on a CPU, or why it cannot."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        return {"path": None, "error": "no C++ compiler is on the PATH"}
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        return {"path": found, "error": f"this Python's headers are not installed ({header})"}
    return {"path": found, "error": None}


def cuda_devices() -> list[str]:
    """Return the names of the CUDA devices that torch can use; none where its driver fails."""
    torch = importlib.import_module("torch")
    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # noqa: BLE001 a driver may fail in any way; then there is no device to use
        sys.stderr.write(f"torch.cuda: {error}\n")
        return []


def _is_found(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of the package around it
        return False
    return spec is not None and spec.origin is not None


def _import_error(name: str) -> str | None:
    try:
        module = importlib.import_module(MODULES.get(name, (name,))[0])
        if name in LAZY:
            getattr(module, LAZY[name])
    except (Exception, SystemExit) as error:  # noqa: BLE001 importing runs anyone's code; its failure is the finding
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return None


def _version(name: str) -> str | None:
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    loaded = getattr(sys.modules.get(name), "__version__", None)
    return str(loaded) if loaded else None


if __name__ == "__main__":
    main()
