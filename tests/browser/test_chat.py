"""Tests of the page in a chat: the official host bridge on two origins, a real server over HTTP and real runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_is_watched_and_another_cancelled_from_the_page_in_a_chat(drive: Any, tmp_path: Path) -> None:
    for file in (ROOT / "examples").glob("digits_cnn.*"):
        shutil.copy(file, tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMGOPTIM_PROJECT": str(tmp_path),
        "OMGOPTIM_PYTHON": sys.executable,
    }
    command = [sys.executable, "-m", "omgoptim.cli", "mcp", "--http", "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment | {"OMGOPTIM_TOKEN": "t" * 20}
    ) as server:
        try:
            assert server.stderr is not None
            found = re.search(r"http://\S+", server.stderr.readline())
            assert found
            model = "digits_cnn.py"
            asked = {"url": found[0], "token": "t" * 20, "project": str(tmp_path), "model": f"{model}:build",
                     "data": f"{model}:load", "pictures": os.environ.get("OMGOPTIM_PICTURES")}  # fmt: skip
            seen = drive("chat.mjs", asked)
        finally:
            server.terminate()
    assert seen["mime"] == "text/html;profile=mcp-app"
    assert seen["bytes"] <= 60_000
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["found"] == []
    assert seen["first"]["waiting"] == "Waiting for the first answer"
    assert seen["dark"] == "rgb(16, 24, 32)" != seen["light"]
    watched, call = seen["watched"], {"action": "show", "run_id": seen["first"]["id"], "project": str(tmp_path)}
    assert len(watched["calls"]) >= 2
    assert all(one == {"name": "runs", "arguments": call} for one in watched["calls"])
    assert watched["verdict"] in ("OK", "NO GAIN", "GUARD FAILED")
    assert all(0 < size["height"] < 20_000 for size in watched["sizes"])
    assert seen["arriving"] >= 1
    assert seen["refused"] == 0
    assert seen["unseen"] == 0
    longer, cancel = (message["content"][0]["text"] for message in seen["messages"])
    assert longer.startswith("Call the tool quantize of omgoptim with ")
    assert json.loads(longer.partition(" with ")[2])["effort"] == "best"
    asked_for = json.loads(cancel.partition(" with ")[2])
    assert asked_for == {"action": "cancel", "run_id": seen["second"]["id"], "project": str(tmp_path)}
    assert {one["arguments"]["action"] for one in seen["cancelled"]["calls"]} == {"show"}
    assert "cancelled" in seen["cancelled"]["title"]
