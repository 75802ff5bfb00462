"""A benchmark's result: the machine, the versions, the seed and the numbers, printed as tables and kept as JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from omgoptim.hardware import cpu_features, cpu_name, other_load, usable_cores

RESULTS = Path(__file__).parent / "results"
BUSY = 0.25
"""Load of other programs, as a fraction of the machine, above which the numbers decide nothing."""

PACKAGES = ("omgoptim", "torch", "onnxruntime", "openvino", "nncf", "onnx", "numpy", "mcp", "pydantic")

console = Console(width=150)


def machine() -> dict[str, Any]:
    """What gives the numbers, and how busy others keep it right now."""
    return {
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cores": usable_cores(),
        "system": platform.platform(terse=True),
        "load_of_others": round(other_load(), 3),
    }


def versions() -> dict[str, str]:
    """Python and the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, str) else _number(cell) for cell in row))
    console.print(shown)


def bar(what: str, value: float, limit: float, *, at_least: bool) -> dict[str, Any]:
    """Judge a number by a bar that was set before it was measured, print the verdict, and return its record."""
    held = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    console.print(
        f"[{'green' if held else 'red'}]{'PASS' if held else 'MISS'}[/]  {what}: {value:.4g} (bar {sign} {limit:g})"
    )
    return {"what": what, "value": value, "bar": f"{sign} {limit:g}", "held": held}


def keep(name: str, seed: int, quick: bool, began: Mapping[str, Any], result: Mapping[str, Any]) -> Path:
    """Write results/<name>.json, or <name>-quick.json, which proves nothing and is not for the repository.

    Args:
        began: the machine as it was at the beginning; its load is read again now.
    """
    RESULTS.mkdir(exist_ok=True)
    load = other_load(1.0)
    if max(load, began["load_of_others"]) > BUSY:
        worst = max(load, began["load_of_others"])
        console.print(f"[red]others used {worst:.0%} of the machine: neither PASS nor MISS counts[/]")
    path = RESULTS / f"{name}{'-quick' if quick else ''}.json"
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "seed": seed,
        "machine": dict(began) | {"load_of_others_at_the_end": round(load, 3)},
        "versions": versions(),
        **result,
    }
    path.write_text(json.dumps(record, indent=1, default=float) + "\n")
    console.print(f"[dim]{path}[/]")
    return path


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
