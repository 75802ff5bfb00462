"""The plugin starts from its folder alone, writes nothing into it, and leaves the user's environment in view."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from mcp import Client, StdioServerParameters

from omgoptim.requests import QUERIES, VERBS

ROOT = Path(__file__).parents[2]


def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plugin_server", ROOT / "plugin" / "server.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(folder: Path) -> Path:
    """A folder that looks like a virtual environment."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").touch()
    return folder


def path_of(*folders: Path) -> str:
    return os.pathsep.join(str(folder) for folder in folders)


def test_the_environment_that_was_active_before_uv_is_found_again(tmp_path: Path) -> None:
    own, user = environment(tmp_path / "uv"), environment(tmp_path / "user")
    path = path_of(own / "bin", user / "bin", Path("/usr/bin"))
    restored = launcher().without_environment(own, {"PATH": path, "VIRTUAL_ENV": str(own)})
    assert restored == {"PATH": path_of(user / "bin", Path("/usr/bin")), "VIRTUAL_ENV": str(user)}


def test_without_an_active_environment_none_is_made_up(tmp_path: Path) -> None:
    own = environment(tmp_path / "uv")
    path = path_of(own / "bin", Path("/usr/bin"))
    restored = launcher().without_environment(own, {"PATH": path, "VIRTUAL_ENV": str(own)})
    assert restored == {"PATH": "/usr/bin"}


@pytest.mark.parametrize("mode", ["legacy", "auto"])
def test_the_plugin_serves_every_verb_from_its_folder_alone(tmp_path: Path, mode: str) -> None:
    plugin, home = tmp_path / "plugin", tmp_path / "home"
    home.mkdir()
    for part in ("omgoptim", "plugin", "commands"):
        shutil.copytree(ROOT / part, plugin / part, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(plugin.rglob("*"))
    server = StdioServerParameters(
        command=sys.executable,
        args=[str(plugin / "plugin" / "server.py")],
        env={"HOME": str(home), "PATH": os.environ["PATH"], "PLUGIN_DATA": str(tmp_path / "data")},
        cwd=str(plugin),
    )

    async def names() -> tuple[set[str], set[str]]:
        async with Client(server, mode=mode) as client:
            tools, prompts = await client.list_tools(), await client.list_prompts()
            return {tool.name for tool in tools.tools}, {prompt.name for prompt in prompts.prompts}

    tools, prompts = asyncio.run(names())
    assert tools == {*VERBS, *QUERIES}
    assert prompts == {path.stem for path in (ROOT / "commands").glob("*.md")}
    assert sorted(plugin.rglob("*")) == before
