# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "mcp>=2.3,<3",
#   "pydantic>=2.11",
#   "filelock>=3.16",
#   "psutil>=6",
#   "typing-extensions>=4.12",
# ]
# ///
"""Start the MCP server from the plugin folder alone: `uv run --script plugin/server.py`.

uv makes (once) and reuses an environment with the few packages above: no torch, so the server starts in about a
second. The models run in the user's own Python. Nothing is written into the plugin folder.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import mcp.server  # noqa: F401  before the byte code goes elsewhere: uv's environment keeps its own

PLUGIN = Path(__file__).resolve().parent.parent


def without_environment(own: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables PATH and VIRTUAL_ENV as they were before uv put the environment `own` in front.

    uv sets both to the environment of this script. It has no torch, so the search for the Python that has the user's
    packages must not end there. The environment that was active before is the first one that is left on the PATH.
    """
    folders = [folder for folder in environ.get("PATH", "").split(os.pathsep) if Path(folder).parent != own]
    active = [Path(folder).parent for folder in folders if (Path(folder).parent / "pyvenv.cfg").is_file()]
    restored = {"PATH": os.pathsep.join(folders)}
    return restored | {"VIRTUAL_ENV": str(active[0])} if active else restored


def main() -> None:
    own = Path(sys.prefix)
    if os.environ.get("VIRTUAL_ENV") == str(own) and importlib.util.find_spec("torch") is None:
        del os.environ["VIRTUAL_ENV"]
        os.environ.update(without_environment(own, os.environ))
    os.environ.setdefault("PLUGIN_ROOT", str(PLUGIN))  # so that this folder is never taken for the user's project
    data = os.environ.get("PLUGIN_DATA") or str(Path.home() / ".cache" / "omgoptim")
    sys.pycache_prefix = str(Path(data) / "pycache")
    sys.path[0] = str(PLUGIN)
    from omgoptim.server import main as serve

    serve()


if __name__ == "__main__":
    main()
