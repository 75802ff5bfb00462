"""A Chromium and the packages of `package.json`, in a cache folder; the tests skip where there is none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Drive = Callable[..., Any]
"""`drive(script, asked)`: what a script of this folder answers."""


@pytest.fixture(scope="session")
def drive() -> Drive:
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None or shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs chromium, node and npm")
    packages = _installed()
    environment = os.environ | {"NODE_FOLDER": str(packages), "CHROMIUM": chromium}

    def run(script: str, asked: Any, timeout_s: float = 240) -> Any:
        command = ["node", str(HERE / script), json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _installed() -> Path:
    """The folder with the packages, installed once for each version of `package.json`."""
    wanted = (HERE / "package.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omgoptim-tests"
    folder = cache / f"browser-{hashlib.sha256(wanted).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            (folder / "package.json").write_bytes(wanted)
            command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
            command += ["--fetch-retries=1", "--fetch-timeout=20000"]
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
            except subprocess.TimeoutExpired:
                pytest.skip("npm cannot install the test's packages: no answer within 120 s")
            if done.returncode != 0:
                pytest.skip(f"npm cannot install the test's packages: {done.stderr.strip()[-200:]}")
            (folder / "done").touch()
    return folder
