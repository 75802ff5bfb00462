"""The package for a target is small and complete; the agent needs no packages, its processes numpy and an engine."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile

from omgoptim.measure.target.package import measuring_package

WITHOUT_THE_REST = """
import sys
blocked = {"torch", "pydantic", "psutil", "onnx", "safetensors", "filelock", "openvino", "scipy", "numpy"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import omgoptim.measure.target.agent
from omgoptim.hardware import LoadMeter, other_load
blocked.remove("numpy")
from omgoptim.measure.measuring_server import peak_resident_bytes
assert omgoptim.__file__.startswith(sys.argv[1])
assert 0 <= other_load(0.05) <= 1 and 0 <= LoadMeter().load() <= 1
print(peak_resident_bytes())
"""


def test_it_is_the_same_each_time_and_holds_source_only():
    package = measuring_package()
    assert package.name == measuring_package.__wrapped__().name
    with tarfile.open(fileobj=io.BytesIO(package.archive)) as archive:
        names = archive.getnames()
    assert all(name.startswith("omgoptim/") and name.endswith(".py") for name in names)
    assert not [name for name in names if "/operations/" in name or "/requests/" in name or "/reports/" in name]
    assert len(package.archive) < 200_000


def test_the_agent_needs_python_alone_and_its_processes_numpy(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(measuring_package().archive)) as archive:
        archive.extractall(tmp_path, filter="data")
    command = [sys.executable, "-c", WITHOUT_THE_REST, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
