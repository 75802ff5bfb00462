"""Every public name of distillation has an example in its docstring, and the example does what it says."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

PUBLIC = [
    "omgoptim.DistillationLoss",
    "omgoptim.FeatureLoss",
    "omgoptim.derive_student",
    "omgoptim.blocks.DepthSeparableConv",
    "omgoptim.blocks.InvertedResidual",
    "omgoptim.blocks.LoRAConv",
    "omgoptim.blocks.LoRALinear",
    "omgoptim.blocks.LowRankLinear",
    "omgoptim.blocks.SpatialConv2d",
    "omgoptim.blocks.Tucker2Conv2d",
]
"""Names whose examples are run, one a line."""


def example_of(name: str) -> doctest.DocTest:
    """The examples in the docstring of a public name."""
    package, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(package), attribute)
    return doctest.DocTestParser().get_doctest(value.__doc__ or "", {}, name, None, 0)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_in_a_public_docstring_gives_what_it_shows(name: str) -> None:
    test = example_of(name)
    assert test.examples, f"{name} has no example (lines that begin with >>>) in its docstring"
    said: list[str] = []
    with torch.random.fork_rng(devices=[]):
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert result.failed == 0, "".join(said)


def test_every_name_of_the_blocks_is_in_the_list() -> None:
    blocks = importlib.import_module("omgoptim.blocks")
    assert {f"omgoptim.blocks.{name}" for name in blocks.__all__ if not name.isupper()} <= set(PUBLIC)
