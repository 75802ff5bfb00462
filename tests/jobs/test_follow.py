from __future__ import annotations

from collections.abc import Callable

from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.follow import follow
from omgoptim.reports import RunState

Launch = Callable[..., RunFolder]
InStage = Callable[[RunFolder, str], RunState]


def test_a_run_is_followed_to_its_end_and_no_state_is_told_twice(start: Launch) -> None:
    folder = start("context.progress('one', 0.1)\ncontext.progress('two', 0.2)\nreturn report(context)")
    states = list(follow(folder, 60, interval_s=0.01))
    seen = [(state.status, state.stage, state.progress) for state in states]
    assert seen[-1] == ("done", "done", 1.0)
    assert len(set(seen)) == len(seen) >= 2


def test_following_stops_at_the_timeout_with_the_run_still_going(start: Launch, in_stage: InStage) -> None:
    folder = start("hold(context)")
    in_stage(folder, "holding")
    assert [state.status for state in follow(folder, 0.05, interval_s=0.01)] == ["running"]
    assert [state.status for state in follow(folder, 0)] == ["running"]
