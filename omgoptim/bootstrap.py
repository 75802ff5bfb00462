"""Import of omgoptim in a fresh process: by its file, whatever Python and packages the process has."""

from __future__ import annotations

from pathlib import Path

import omgoptim

PACKAGE_FILE = Path(omgoptim.__file__).resolve()

USER_PATH = "OMGOPTIM_USER_PATH"
"""Environment variable with the user's folders of PYTHONPATH: importable only once code of the project was named."""

IMPORT_OMGOPTIM = """\
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util
spec = importlib.util.spec_from_file_location("omgoptim", sys.argv[1])
module = sys.modules["omgoptim"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
"""First lines of a `python -c` whose first argument is `PACKAGE_FILE`: `import omgoptim...` works afterwards, and
neither the working directory nor the packages beside omgoptim can stand in for this Python's own. The working directory
goes before anything is imported: in a project, `importlib.py` would be the project's."""
