from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

from omgoptim.bootstrap import PACKAGE_FILE

SCRIPT = PACKAGE_FILE.parent / "operations" / "inspect_python.py"


def test_one_json_object_is_all_that_reaches_standard_output(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "nncf").mkdir()
    (site / "nncf" / "__init__.py").write_text("import os\nprint('noise')\nos.system('echo more noise')")
    (site / "timm.py").write_text("raise SystemExit('no licence')")
    done = subprocess.run([tmp_path / "env" / "bin" / "python", SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert "more noise" in done.stderr
    assert found["packages"]["nncf"] == {"state": "ok", "version": None, "error": None}
    assert found["packages"]["timm"] == {"state": "broken", "version": None, "error": "SystemExit: no licence"}
    assert found["packages"]["torch"]["state"] == "missing"
    assert found["python"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert found["cuda_devices"] == []


def test_without_imports_nothing_is_imported(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "nncf.py").write_text("import os; os.abort()")
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run([python, SCRIPT, "--no-imports"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["packages"]["nncf"]["state"] == "ok"
    assert subprocess.run([python, SCRIPT], capture_output=True, check=False).returncode < 0
