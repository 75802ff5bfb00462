from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from omgoptim.blocks import DepthSeparableConv, InvertedResidual
from omgoptim.errors import TechniqueError
from omgoptim.techniques.distill._student.block_replacement import BlockNames, replace_convolutions
from omgoptim.techniques.distill._student.layer_selection import LayerSelection
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
ALL, WORDS = LayerSelection([], []), BlockNames("block", "a block")


def own_forward(*sizes: int) -> nn.Module:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    return Own(*sizes, padding=1)


def frozen() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Conv2d(8, 8, 1), "kernel of size 1"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), "2 groups"),
        (nn.ConvTranspose2d(8, 8, 3, padding=1), "ConvTranspose2d has no such block"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "circular"),
        (own_forward(8, 8, 3), "a forward of its own"),
        (frozen(), "weight is frozen"),
        (weight_norm(nn.Conv2d(8, 8, 3, padding=1)), "a parametrization"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_convolutions_that_no_block_stands_for_stay_with_the_reason(
    layer: nn.Module, said: str, run_of: RunOf, drawn: Any
) -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), layer)
    run = run_of(module, drawn(2, 8, 6, 6))
    outcome = replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, ALL, run, fit=False)
    assert [change.path for change in outcome.changed] == ["0"]
    (skip,) = [skip for skip in outcome.skipped if skip.path == "1"]
    assert said in skip.reason
    assert module[1] is layer


def test_hooked_shared_and_uncalled_convolutions_stay(run_of: RunOf, drawn: Any) -> None:
    module = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
    module[0].register_forward_hook(lambda *_: None)
    module[2].weight = module[1].weight
    module.spare = nn.ModuleList([nn.Conv2d(8, 8, 3)])
    forward = nn.Sequential(*list(module)[:4]).forward
    module.forward = forward
    run = run_of(module, drawn(2, 8, 6, 6))
    outcome = replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, ALL, run, fit=False)
    reasons = {skip.path: skip.reason for skip in outcome.skipped}
    assert "hooks" in reasons["0"]
    assert "weight is shared" in reasons["1"]
    assert "does not call it" in reasons["spare.0"]
    assert [change.path for change in outcome.changed] == ["3"]


def test_a_stem_of_few_channels_stays_unless_it_is_named(run_of: RunOf, drawn: Any) -> None:
    def module() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))

    for selection, stem in ((ALL, nn.Conv2d), (LayerSelection(["0"], []), DepthSeparableConv)):
        net = module()
        run = run_of(net, drawn(2, 3, 6, 6))
        replace_convolutions(net, DepthSeparableConv.from_conv, WORDS, selection, run, fit=False)
        assert type(net[0]) is stem


def test_a_convolution_whose_block_would_not_be_smaller_stays(run_of: RunOf, drawn: Any) -> None:
    """By hand, expansion 6: 8 -> 64 is 48 (8 + 9 + 64) + 2 (48 + 48 + 64) = 4,208, of 4,672; 8 -> 8 more than 584."""
    module = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 64, 3, padding=1))
    run = run_of(module, drawn(2, 8, 6, 6))
    outcome = replace_convolutions(module, lambda conv: InvertedResidual.like(conv, 6), WORDS, ALL, run, fit=False)
    assert [(change.path, change.after) for change in outcome.changed] == [("1", "4,208 of 4,672 parameters")]
    assert outcome.skipped[0].reason == "a block would have 1,408 parameters, and it has 584"


def test_a_model_without_such_a_convolution_is_refused_with_the_reasons(run_of: RunOf, drawn: Any) -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 1))
    run = run_of(module, drawn(2, 8, 6, 6))
    with pytest.raises(TechniqueError, match="can become a block") as refused:
        replace_convolutions(module, DepthSeparableConv.from_conv, WORDS, ALL, run, fit=False)
    assert "0: kernel of size 1" in refused.value.why
