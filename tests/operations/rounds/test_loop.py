"""Choice of a round and merged changes of rounds; no model is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from omgoptim.measure.quality import Quality
from omgoptim.operations.compression_job import Job
from omgoptim.operations.rounds.checkpoint import STATE, RoundState, read_round, write_round
from omgoptim.operations.rounds.loop import choose_round, has_collapsed, merge_changes
from omgoptim.reports import Change, Epoch, Round, Skip
from omgoptim.requests import PruneRequest, parse
from omgoptim.techniques.registry import Outcome

ORIGINAL = 0.9
FAILED = Quality("top1_accuracy", 0.9, 0.85, 0.05, 0.04, 0.06, 0.9, 600)


def job(guard: float = 0.02) -> Job:
    request = cast(PruneRequest, parse("prune", {"model": "net.py:build", "max_quality_drop": guard}))
    datasets = cast(Any, SimpleNamespace(evaluator=SimpleNamespace(original=ORIGINAL)))
    nothing = cast(Any, None)
    return Job(request, nothing, nothing, datasets, nothing, "torch_eager", 1)


def state(number: int, quality: float, outcome: Outcome | None = None) -> RoundState:
    return RoundState(nn.Identity(), Round(number=number), outcome or Outcome([]), quality=quality)


def kept_number(qualities: list[float], guard: float = 0.02) -> int:
    return choose_round(
        job(guard), [state(index, quality) for index, quality in enumerate(qualities, 1)]
    ).state.record.number


@pytest.mark.parametrize(
    ("qualities", "number"),
    [
        ([0.9, 0.89, 0.885], 3),
        ([0.9, 0.89, 0.5], 2),
        ([0.86, 0.89, 0.6], 2),
        ([0.7, 0.6, 0.65], 1),
        ([0.5, 0.7, 0.7], 3),
        ([float("-inf")], 1),
    ],
)
def test_the_last_round_within_the_guard_is_kept_else_the_one_that_lost_least(
    qualities: list[float], number: int
) -> None:
    assert kept_number(qualities) == number


def test_each_round_says_why_it_is_kept_or_not() -> None:
    kept = choose_round(job(), [state(1, 0.9), state(2, 0.89), state(3, 0.8), state(4, 0.2)])
    assert kept.rewound
    assert [s.record.kept for s in kept.states] == [False, True, False, False]
    assert [s.record.why for s in kept.states] == [
        "intermediate round",
        "the last round within the guard",
        "lost 0.1000, more than the guard 0.02",
        "the quality collapsed: discarded",
    ]


@pytest.mark.parametrize(
    ("qualities", "order"),
    [
        ([0.9, 0.89, 0.885], [3, 2, 1]),
        ([0.885, 0.9, 0.89, 0.885, 0.89], [5, 4, 2]),
        ([0.9, 0.9, 0.88, 0.9], [4, 3, 1]),
        ([0.89, 0.9, 0.885], [3, 2]),
        ([0.9, 0.7, 0.885, 0.5], [3, 1]),
        ([0.9], [1]),
        ([0.7, 0.6], [1]),
    ],
)
def test_the_fallbacks_are_the_round_within_the_guard_before_it_and_the_one_that_lost_least(
    qualities: list[float], order: list[int]
) -> None:
    kept = choose_round(job(), [state(index, quality) for index, quality in enumerate(qualities, 1)])
    found = [kept.state.record.number]
    following = kept.next(job(), FAILED)
    while following is not None:
        found.append(following.state.record.number)
        assert [s.record.number for s in following.states if s.record.kept] == found[-1:]
        following = following.next(job(), FAILED)
    assert found == order


def test_a_round_that_fails_on_the_evaluation_data_says_so() -> None:
    kept = choose_round(job(), [state(1, 0.9), state(2, 0.89), state(3, 0.8)])
    following = kept.next(job(), FAILED)
    assert following is not None
    assert following.failures == ["round 2 loses 0.0500, more than 0.02, on the evaluation data"]
    assert [s.record.why for s in following.states] == [
        "the next within the guard, in the order fixed on the selection samples",
        "loses 0.0500, more than 0.02, on the evaluation data",
        "lost 0.1000, more than the guard 0.02",
    ]


@pytest.mark.parametrize(
    ("untrained", "trained", "tried"), [(0.89, True, True), (0.87, True, False), (0.89, False, False)]
)
def test_the_fallback_of_a_single_round_is_what_it_was_before_a_training_that_helped(
    tmp_path: Path, untrained: float, trained: bool, tried: bool
) -> None:
    original = nn.Linear(2, 2)
    before, after = state(1, untrained), state(1, 0.895)
    before.module, after.module = nn.Linear(2, 2), nn.Linear(2, 2)
    after.epochs = [Epoch(epoch=1, loss=0.1, learning_rate=0.1, seconds=1.0, best=trained)]
    write_round(tmp_path / "round-1" / "taken", before, original)
    context = cast(Any, SimpleNamespace(checkpoints=tmp_path))
    single = replace(job(), context=context, original=original)
    following = choose_round(single, [after]).next(single, FAILED)
    assert (following is not None) is tried
    if following is not None:
        assert torch.equal(following.state.module.weight, before.module.weight)
        assert following.state.record.quality_drop == pytest.approx(ORIGINAL - untrained)
        assert [epoch.best for epoch in following.state.epochs] == [False]
        assert not following.rewound  # the amount that was asked for is reached
        assert "loses 0.0500, more than 0.02, on the evaluation data" in following.failures[0]
        assert following.next(single, FAILED) is None


@pytest.mark.parametrize("key", ["structural_diff", "surgery"])
def test_a_checkpoint_of_this_and_of_older_versions_is_read_back(tmp_path: Path, key: str) -> None:
    original, smaller = nn.Sequential(nn.Linear(2, 4)), nn.Sequential(nn.Linear(2, 3))
    before = state(1, 0.9)
    before.module = smaller
    write_round(tmp_path / "before", before, original)
    stored = json.loads((tmp_path / "before" / STATE).read_text())
    stored[key] = stored.pop("structural_diff")
    (tmp_path / "before" / STATE).write_text(json.dumps(stored))
    read = read_round(tmp_path / "before", original)
    assert read is not None
    assert torch.equal(read.module.get_parameter("0.weight"), smaller.get_parameter("0.weight"))


def test_a_round_has_collapsed_when_half_of_the_quality_is_gone_or_it_is_no_number() -> None:
    assert not has_collapsed(job(), state(1, 0.46))
    assert has_collapsed(job(), state(1, 0.44))
    assert has_collapsed(job(), state(1, float("-inf")))


def test_changes_of_several_rounds_go_from_the_first_state_to_the_last_of_the_kept_one() -> None:
    def narrowed(before: str, after: str) -> Outcome:
        changed = [Change(path="conv", what="channels", before=before, after=after)]
        return Outcome(changed, [Skip(path="fc", reason="outputs"), Skip(path="conv", reason="once")])

    states = [
        state(1, 0.9, narrowed("64", "48")),
        state(2, 0.9, narrowed("48", "32")),
        state(3, 0, narrowed("32", "8")),
    ]
    together = merge_changes(states, states[1])
    assert together.changed == [Change(path="conv", what="channels", before="64", after="32")]
    assert together.skipped == [Skip(path="fc", reason="outputs")]


def test_a_layer_that_stays_and_reads_fewer_channels_is_in_both_lists() -> None:
    reads = Change(path="fc", what="input channels", before="64", after="48", indirect=True)
    only = state(1, 0.9, Outcome([reads], [Skip(path="fc", reason="outputs")]))
    together = merge_changes([only], only)
    assert together.changed == [reads]
    assert together.skipped == [Skip(path="fc", reason="outputs")]
