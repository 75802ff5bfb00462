"""Shell and MCP server give the same report for the same request; only ids, times and measured numbers may differ."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from omgoptim.jobs.actions import cancel
from omgoptim.jobs.folder import find_run
from omgoptim.jobs.states import ENDED, list_runs

ROOT = Path(__file__).parents[1]

MEASURED = {
    "latency_ms_p50", "latency_ms_p90", "throughput_per_s", "peak_memory_bytes", "speedup", "speedup_low",
    "speedup_high", "expected_seconds", "throughput_ratio", "memory_ratio", "time_ms", "time_share", "load", "seconds",
}  # fmt: skip
"""Numbers that no two runs share."""

TOLD = {"outcome", "summary", "warnings", "why", "status", "run_id", "files", "next_steps"}
"""Fields of an answer about such numbers, and its run id."""

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    for file in (ROOT / "examples").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    yield tmp_path
    for state in list_runs(tmp_path):
        cancel(find_run(tmp_path, state.run_id))


def environment(project: Path) -> dict[str, str]:
    ours = {"PYTHONPATH": str(ROOT), "OMGOPTIM_PROJECT": str(project), "OMGOPTIM_PYTHON": sys.executable}
    return dict(os.environ) | ours


def through_the_shell(project: Path, verb: str, raw: dict[str, Any]) -> dict[str, Any]:
    words = [str(raw["model"])]
    for name, value in raw.items():
        if name != "model":
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = [sys.executable, "-m", "omgoptim.cli", verb, *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment(project), check=False)
    assert done.returncode in (0, 4), done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


async def through_mcp(project: Path, verb: str, raw: dict[str, Any]) -> dict[str, Any]:
    """As an agent does it: call, then follow `next_steps` until there is a report."""
    how = StdioServerParameters(
        command=sys.executable, args=["-m", "omgoptim.server"], env=environment(project), cwd=str(project)
    )
    async with Client(how) as client:
        result = await client.call_tool(verb, raw | {"detail": "full"})
        while not result.is_error and result.structured_content.get("status") not in (None, *ENDED):
            (step,) = result.structured_content["next_steps"]
            result = await client.call_tool(step["tool"], step["arguments"] | {"detail": "full"})
    assert not result.is_error, result.structured_content
    report: dict[str, Any] = result.structured_content
    return report


def comparable(value: Any) -> Any:
    """A report without what may differ. A ratio that a busy machine does not support may even be missing in one."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in TOLD}
        return {key: "measured" if key in MEASURED else comparable(item) for key, item in kept.items()}
    return [comparable(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("profile", {"runtime": "onnxruntime"}),
        ("quantize", {"scheme": "static", "runtime": "onnxruntime", "algorithm": "onnxruntime"}),
        ("quantize", {"plan": True}),
        pytest.param("prune", {"pruning_ratio": 0.5, "epochs": 1, "max_quality_drop": 0.5}, marks=pytest.mark.slow),
        pytest.param(
            "factorize",
            {"method": "whitened", "rank_ratio": 0.5, "epochs": 0, "max_quality_drop": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "distill",
            {"student": "depthwise", "width": 0.5, "epochs": 1, "control": True, "max_quality_drop": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param("optimize", {"plan": True}, marks=pytest.mark.slow),
        pytest.param("search", {"space": "auto", "target_size_mb": 0.3, "plan": True}, marks=pytest.mark.slow),
    ],
    ids=["profile", "quantize", "plan", "prune", "factorize", "distill", "plan of optimize", "plan of search"],
)
async def test_both_faces_give_the_same_report(verb: str, more: dict[str, Any], project: Path) -> None:
    raw = {"model": "digits_cnn.py:build", "data": "digits_cnn.py:load", "timing": "quick", **more}
    shell = through_the_shell(project, verb, raw)
    assistant = await through_mcp(project, verb, raw)
    run_ids = {shell["run_id"]: "RUN", assistant["run_id"]: "RUN"}
    shell, assistant = (json.loads(_renamed(json.dumps(report), run_ids)) for report in (shell, assistant))
    for report in (shell, assistant):
        report["layers"] = sorted(report["layers"], key=lambda layer: layer["path"])
    assert comparable(assistant) == comparable(shell)
    assert set(assistant) - {"files"} == set(shell)


@pytest.mark.slow
async def test_both_faces_optimize_alike(project: Path) -> None:
    goal = {"max_quality_drop": 0.05, "prefer": "size", "runtime": "onnxruntime", "budget_minutes": 600, "samples": 100}
    raw = {"model": "digits_cnn.py:build", "data": "digits_cnn.py:load", "timing": "quick", "threads": 1, **goal}
    shell = through_the_shell(project, "optimize", raw)
    assistant = await through_mcp(project, "optimize", raw)
    for report in (shell, assistant):
        assert report["outcome"] == "ok"
        assert any(step["status"] == "kept" for step in report["steps"])
    chains = [[(step["name"], step["verb"], step["size_bytes"]) for step in one["steps"]] for one in (shell, assistant)]
    assert chains[0] == chains[1]
    assert shell["after"]["size_bytes"] == assistant["after"]["size_bytes"]
    assert shell["after"]["quality"] == assistant["after"]["quality"]


@pytest.mark.slow
async def test_both_faces_search_alike(project: Path) -> None:
    goal = {"max_quality_drop": 1, "target_size_mb": 0.1, "trials": 2, "epochs": 1, "samples": 100}
    raw = {"model": "digits_space.py:space", "data": "digits_cnn.py:load", "timing": "quick", "threads": 1, **goal}
    shell = through_the_shell(project, "search", raw)
    assistant = await through_mcp(project, "search", raw)
    found = [
        [(one["name"], one["size_bytes"], one["quality"]) for one in two["candidates"]] for two in (shell, assistant)
    ]
    assert found[0] == found[1]
    assert shell["after"]["size_bytes"] == assistant["after"]["size_bytes"]
    assert shell["after"]["quality"] == assistant["after"]["quality"]


def _renamed(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text
