"""Public functions and blocks have an example in their docstring, and the example does what it shows."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import omgoptim
from omgoptim.requests import VERBS, techniques

ROOT = Path(__file__).parents[2]

PUBLIC = [
    "omgoptim.DistillationLoss",
    "omgoptim.FeatureLoss",
    "omgoptim.OmgoptimError",
    "omgoptim.compare",
    "omgoptim.derive_student",
    "omgoptim.distill",
    "omgoptim.export_coreml",
    "omgoptim.factorize",
    "omgoptim.open_artifact",
    "omgoptim.optimize",
    "omgoptim.pick",
    "omgoptim.profile",
    "omgoptim.prune",
    "omgoptim.quantize",
    "omgoptim.search",
    "omgoptim.blocks.DepthSeparableConv",
    "omgoptim.blocks.InvertedResidual",
    "omgoptim.blocks.LoRAConv",
    "omgoptim.blocks.LoRALinear",
    "omgoptim.blocks.LowRankLinear",
    "omgoptim.blocks.ResizedConv2d",
    "omgoptim.blocks.SpatialConv2d",
    "omgoptim.blocks.Tucker2Conv2d",
    *(
        f"omgoptim.{params.__name__}"
        for verb in VERBS.values()
        for params in techniques(verb).values()
        if hasattr(omgoptim, params.__name__)
    ),
]
"""Names whose examples are run, one a line.

Skipped in the docstring, since they measure in fresh processes: profile, optimize, search, compare, pick and
open_artifact.
`tests/test_api.py`, `tests/jobs/test_pick.py` and `tests/operations/` run them.
"""


def example_of(name: str) -> doctest.DocTest:
    """The examples in the docstring of a public name."""
    package, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(package), attribute)
    return doctest.DocTestParser().get_doctest(value.__doc__ or "", {}, name, None, 0)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_in_a_public_docstring_gives_what_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # run folders
    test = example_of(name)
    assert test.examples, f"{name} has no example (lines that begin with >>>) in its docstring"
    said: list[str] = []
    with torch.random.fork_rng(devices=[]):
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert result.failed == 0, "".join(said)


def test_every_name_of_the_blocks_is_in_the_list() -> None:
    blocks = importlib.import_module("omgoptim.blocks")
    assert {f"omgoptim.blocks.{name}" for name in blocks.__all__ if not name.isupper()} <= set(PUBLIC)


def test_every_public_name_is_in_the_list_but_the_record_that_runs_return() -> None:
    names = set(omgoptim.__all__) - {"EfficiencyReport", "__version__"}
    assert {f"omgoptim.{name}" for name in names} <= set(PUBLIC)


def test_every_public_name_is_in_the_reference() -> None:
    """By its own entry, or by that of the module that defines it."""
    entries = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE))
    missing = []
    for package in (omgoptim, *map(importlib.import_module, ("omgoptim.blocks", "omgoptim.reports"))):
        for name in package.__all__:
            value = getattr(package, name)
            home = getattr(value, "__module__", "")
            shown = {home, f"{home}.{name}", f"omgoptim.api.{name}"} & entries
            if callable(value) and not shown and name != "Record":  # the base that every record has
                missing.append(name)
    assert not missing
