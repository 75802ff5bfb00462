from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from omgoptim.blocks import InvertedResidual as Block
from omgoptim.errors import TechniqueError
from omgoptim.measure.size import count_params
from omgoptim.requests.distill import InvertedResidual
from omgoptim.techniques.registry import apply_to_module


def test_every_3x3_but_the_stem_becomes_a_block_of_the_expansion(run_of: Any, drawn: Any, resnet: Any) -> None:
    teacher = resnet(16)
    apply_to_module(teacher, InvertedResidual(expansion=1.5), run_of(teacher, drawn(32, 1, 12, 12)))
    blocks = [layer for layer in teacher.modules() if isinstance(layer, Block)]
    assert [block.hidden for block in blocks] == [24, 24, 24, 48, 48, 96]
    assert not any(block.adds_input for block in blocks)
    assert isinstance(teacher.stem[0], nn.Conv2d)


def test_layers_that_would_not_get_smaller_stay(run_of: Any, drawn: Any, resnet: Any) -> None:
    """At expansion 4, 8 -> 8: 32 (8 + 9 + 8) + 2 (32 + 32 + 8) = 944, of 576.

    16 -> 32: 64 (16 + 9 + 32) + 2 (64 + 64 + 32) = 3,968, of 4,608.
    """
    teacher = resnet(8)
    before = count_params(teacher)[0]
    outcome = apply_to_module(teacher, InvertedResidual(expansion=4), run_of(teacher, drawn(32, 1, 12, 12)))
    assert [change.path for change in outcome.changed] == ["stages.2.0.conv1"]
    assert count_params(teacher)[0] == before - 4_608 + 3_968
    assert {skip.path: skip.reason for skip in outcome.skipped}["stages.0.0.conv1"].endswith(
        "944 parameters, not fewer than its 576"
    )


def test_an_expansion_at_which_nothing_gets_smaller_is_refused(run_of: Any, drawn: Any, resnet: Any) -> None:
    teacher = resnet(8)
    with pytest.raises(TechniqueError, match="can be replaced by an inverted residual block"):
        apply_to_module(teacher, InvertedResidual(expansion=16), run_of(teacher, drawn(32, 1, 12, 12)))
