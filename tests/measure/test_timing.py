"""The arithmetic and the order of a timing, and a few small real ones. What a time is worth, `benchmarks/` measures."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from omgoptim.errors import ArtifactError, ModelError
from omgoptim.measure import measuring_process
from omgoptim.measure.launch import TimingPlan
from omgoptim.measure.measuring_process import ProcessPool, TimingSetup
from omgoptim.measure.timing import (
    PLANS,
    SCREENING_PLAN,
    T_975,
    Ratio,
    Timing,
    has_converged,
    t_interval,
    time_artifacts,
)

TINY = TimingPlan(launches=1, most_launches=1, rounds=2, turn_s=0.01, throughput_rounds=1)


# Intervals


def test_the_quantiles_are_those_of_students_t():
    expected = [stats.t.ppf(0.975, freedom) for freedom in range(1, len(T_975) + 1)]
    assert pytest.approx(expected, abs=6e-4) == T_975


@pytest.mark.parametrize("count", [2, 5, 8, 24])
def test_the_interval_is_scipys(count):
    values = np.random.default_rng(count).normal(0.1, 0.05, count)
    centre, half = t_interval(values.tolist())
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert (centre - half, centre + half) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_two_values_by_hand():
    """Mean 2, standard deviation sqrt(2), standard error 1; 12.706 is the quantile for one degree of freedom."""
    assert t_interval([1.0, 3.0]) == pytest.approx((2.0, 12.706))


def test_past_30_values_the_interval_is_a_little_wider_than_students():
    values = np.random.default_rng(0).normal(size=60)
    half = t_interval(values.tolist())[1]
    exact = stats.t.ppf(0.975, 59) * stats.sem(values)
    assert exact < half < 1.03 * exact


def test_one_launch_gives_no_interval():
    assert t_interval([0.3]) == (0.3, math.inf)


@pytest.mark.parametrize(
    ("ratio", "decided"),
    [(Ratio(1.5, None, None), False), (Ratio(1.5, 1.01, 2.2), True), (Ratio(1.1, 0.99, 1.3), False),
     (Ratio(0.8, 0.7, 0.9), True)],
)  # fmt: skip
def test_a_ratio_is_decided_when_its_interval_excludes_1(ratio, decided):
    assert ratio.decided is decided


# When to stop

NARROW = [0.10, 0.11, 0.10, 0.11, 0.10]
WIDE = [0.0, 0.2, -0.2, 0.1, -0.1]
WIDE_AND_FAR = [1.0, 1.2, 0.8, 1.1, 0.9]
STANDARD = PLANS["standard"]


@pytest.mark.parametrize(
    ("log_ratios", "launches", "stops"),
    [
        ([NARROW[:4]], 4, False),  # never before the plan's launches
        ([NARROW], 5, True),
        ([WIDE], 5, False),
        ([WIDE_AND_FAR], 5, True),  # its half-width is 0.2, and 1 is five of them away
        ([NARROW, WIDE], 5, False),  # the widest decides
        ([WIDE], 8, True),  # the plan's end
        ([], 5, True),  # nothing to compare with
    ],
)
def test_the_standard_plan_stops_when_every_interval_is_narrow_or_far_from_1(log_ratios, launches, stops):
    assert has_converged(log_ratios, launches, STANDARD) is stops


def test_an_interval_that_excludes_1_is_no_reason_to_stop():
    values = [0.02, 0.14, 0.08, 0.03, 0.13]
    centre, half = t_interval(values)
    assert centre > half > STANDARD.narrow
    assert not has_converged([values], 5, STANDARD)


@pytest.mark.parametrize("plan", [PLANS["quick"], SCREENING_PLAN])
def test_plans_of_one_launch_stop_after_it(plan):
    assert has_converged([[0.0]], 1, plan)


# The order of turns, on processes that only note what they are asked


class Notes:
    """Stands in for measuring processes: answers from `seconds` by artifact, and notes every command."""

    def __init__(self, seconds, fails=None):
        self.seconds, self.fails, self.asked = seconds, fails or {}, []
        self.opened = 0

    def process(self, artifact, setup, batches):
        return _Noted(self, artifact)


class _Noted:
    def __init__(self, notes, artifact):
        self.notes, self.artifact, self.turns = notes, artifact, 0

    def __enter__(self):
        self.notes.asked.append(("start", self.artifact))
        return self

    def __exit__(self, *error):
        self.notes.asked.append(("end", self.artifact))

    def begin_open(self):
        pass

    def end_open(self):
        self.notes.opened += 1
        return self._answer("open", {"differences": [0.0, self.notes.opened / 10]})

    def ask(self, command, **arguments):
        seconds = self.notes.seconds[self.artifact]
        at = seconds[self.turns % len(seconds)] if isinstance(seconds, list) else seconds
        if command == "turn":
            self.turns += 1
        return self._answer(
            command, {"call_s": at, "p50": at, "p90": at * 2, "peak_bytes": 1000 * len(self.artifact)}, arguments
        )

    def _answer(self, command, answer, arguments=None):
        self.notes.asked.append((command, self.artifact, *(arguments or {}).values()))
        if self.notes.fails.get(self.artifact) == command:
            raise ArtifactError(f"{self.artifact} broke at {command}")
        return answer


@pytest.fixture
def noted_timing(monkeypatch, bench):
    def run(artifacts, seconds, plan=TINY, seed=0, fails=None, **options):
        notes = Notes(seconds, fails)
        monkeypatch.setattr(measuring_process, "MeasuringProcess", notes.process)
        return time_artifacts(artifacts, bench, plan, seed, **options), notes

    return run


def test_the_speedup_is_the_firsts_time_over_each_others(noted_timing):
    timings, _ = noted_timing(["a", "bb", "ccc"], {"a": 0.006, "bb": 0.003, "ccc": 0.012})
    assert timings[0].speedup is None
    assert timings[1].speedup == Ratio(pytest.approx(2.0), None, None)
    assert timings[2].speedup == Ratio(pytest.approx(0.5), None, None)
    assert timings[1].throughput_ratio == pytest.approx(2.0)
    assert timings[1].latency_ms_p50 == pytest.approx(3.0)
    assert timings[1].latency_ms_p90 == pytest.approx(6.0)
    assert timings[1].throughput_per_s == pytest.approx(3 / 0.003)  # batch 3
    assert [timing.peak_memory_bytes for timing in timings] == [1000, 2000, 3000]


def test_a_launch_gives_the_median_of_its_rounds_log_ratios(noted_timing):
    plan = replace(TINY, rounds=3, throughput_launches=0)
    timings, _ = noted_timing(["a", "b"], {"a": [0.010, 0.020, 0.030], "b": [0.010, 0.005, 0.010]}, plan)
    assert timings[1].speedup.value == pytest.approx(3.0)  # of 1, 4 and 3; the medians' ratio would be 2
    assert timings[1].throughput_per_s is None
    assert timings[1].throughput_ratio is None
    assert timings[1].peak_memory_bytes is None


@pytest.mark.parametrize(("limit_s", "launches"), [(0.0, 2), (1e9, 5)])
def test_past_its_limit_a_timing_ends_after_two_launches(noted_timing, limit_s, launches):
    plan = replace(TINY, launches=5, most_launches=5, limit_s=limit_s)
    timings, _ = noted_timing(["a", "b"], {"a": 0.006, "b": 0.003}, plan)
    assert timings[1].launches == launches


def test_the_interval_is_over_launches_and_turned_back_into_ratios(noted_timing):
    """Two launches with log ratios log 2 and log 4: their mean is log sqrt 8, their half-width 12.706 log 2 / 2."""
    plan = replace(TINY, launches=2, most_launches=2, throughput_launches=0)
    launches = iter([2.0, 4.0])

    def next_launch(done):
        if done in (0.5, 1.0):  # not between the rounds of a launch
            notes.seconds["b"] = 0.008 / next(launches, 1)

    notes = Notes({"a": 0.008, "b": 0.008 / next(launches)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring_process, "MeasuringProcess", notes.process)
        timings = time_artifacts(["a", "b"], TimingSetup({"latency": "x"}, 1, 1, "."), plan, 0, next_launch)
    half = 12.706 * math.log(2) / 2
    assert timings[1].speedup.value == pytest.approx(math.sqrt(8))
    assert timings[1].speedup.low == pytest.approx(math.sqrt(8) / math.exp(half), rel=1e-4)
    assert timings[1].speedup.high == pytest.approx(math.sqrt(8) * math.exp(half), rel=1e-4)
    assert timings[1].launches == 2


def rounds_of(notes, batch="latency"):
    turns = [asked[1] for asked in notes.asked if asked[0] == "turn" and asked[2] == batch]
    size = len(set(turns))
    return [tuple(turns[start : start + size]) for start in range(0, len(turns), size)]


def test_every_round_has_each_artifact_once_in_a_new_random_order(noted_timing):
    plan = replace(TINY, rounds=40)
    _, notes = noted_timing(["a", "b", "c"], {"a": 1, "b": 1, "c": 1}, plan)
    rounds = rounds_of(notes)
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert set(rounds) == set(itertools.permutations("abc"))


def test_the_seed_decides_the_order(noted_timing):
    plan, seconds = replace(TINY, rounds=20), {"a": 1, "b": 1}
    first, again, other = (noted_timing(["a", "b"], seconds, plan, seed)[1].asked for seed in (1, 1, 2))
    assert first == again != other


def test_the_worst_of_all_launches_is_how_far_each_reopened_output_was(noted_timing):
    plan = replace(TINY, launches=3, most_launches=3)
    timings, _ = noted_timing(["a"], {"a": 1}, plan)
    assert timings[0].reopened == (0.0, 0.3)


def test_every_launch_starts_and_ends_every_process(noted_timing):
    plan = replace(TINY, launches=3, most_launches=3)
    _, notes = noted_timing(["a", "b"], {"a": 1, "b": 1}, plan)
    commands = [asked[0] for asked in notes.asked if asked[0] in ("start", "end")]
    assert commands == ["start", "start", "end", "end"] * 3


def test_throughput_is_measured_in_the_first_launches_only(noted_timing):
    plan = replace(TINY, launches=4, most_launches=4, throughput_launches=2, throughput_rounds=3)
    _, notes = noted_timing(["a", "b"], {"a": 1, "b": 1}, plan)
    assert len(rounds_of(notes, "throughput")) == 2 * 3
    assert len(rounds_of(notes, "latency")) == 4 * 2


def test_a_turn_holds_four_calls_and_one_of_a_slow_model(noted_timing):
    _, notes = noted_timing(["a", "b", "c"], {"a": 3.0, "b": 0.001, "c": 0.09})
    lengths = {asked[1]: asked[3] for asked in notes.asked if asked[0] == "turn"}
    assert lengths == {"a": 3.0, "b": TINY.turn_s, "c": 0.36}


def test_without_a_batch_for_it_throughput_is_not_timed_and_memory_is_read_all_the_same():
    notes = Notes({"a": 0.002, "b": 0.001})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring_process, "MeasuringProcess", notes.process)
        timings = time_artifacts(["a", "b"], TimingSetup({"latency": "x"}, 1, 1, "."), TINY, 0)
    assert [timing.throughput_per_s for timing in timings] == [None, None]
    assert timings[1].throughput_ratio is None
    assert all(timing.peak_memory_bytes for timing in timings)
    assert timings[1].speedup.value == pytest.approx(2.0)


def test_throughput_of_a_very_slow_model_is_measured_once(noted_timing):
    plan = replace(TINY, launches=3, most_launches=3, throughput_launches=2, throughput_rounds=2)
    timings, notes = noted_timing(["a", "b"], {"a": 3.0, "b": 2.0}, plan)
    assert len(rounds_of(notes, "throughput")) == 1
    assert timings[1].throughput_per_s == pytest.approx(3 / 2.0)  # batch 3
    assert len(timings[1].log_ratios) == 3


def test_progress_grows_within_a_launch_too_up_to_one(noted_timing):
    fractions = []
    plan = replace(TINY, launches=2, most_launches=4, narrow=0.0)
    noted_timing(["a", "b"], {"a": 1, "b": [1, 2, 3, 1, 5, 2, 2]}, plan, progress=fractions.append)
    assert fractions == sorted(fractions)
    assert {0.5, 1.0} <= set(fractions)
    assert 0 < fractions[0] < 0.5
    assert max(fractions) == 1.0


@pytest.mark.parametrize("command", ["open", "warm", "turn", "memory"])
def test_a_challenger_that_fails_drops_out_with_its_error_and_the_others_finish(noted_timing, command):
    plan = replace(TINY, launches=2, most_launches=2)
    timings, notes = noted_timing(["a", "b", "c"], {"a": 0.004, "b": 0.001, "c": 0.002}, plan, fails={"b": command})
    assert isinstance(timings[1], ArtifactError)
    assert timings[1].what == f"b broke at {command}"
    assert timings[2].speedup.value == pytest.approx(2.0)
    assert timings[2].launches == 2
    assert sum(asked == ("start", "b") for asked in notes.asked) == 1


@pytest.mark.parametrize("command", ["open", "warm", "turn"])
def test_the_first_ones_failure_ends_the_race(noted_timing, command):
    with pytest.raises(ArtifactError, match=f"a broke at {command}"):
        noted_timing(["a", "b"], {"a": 1, "b": 1}, fails={"a": command})


def test_what_else_is_wanted_is_done_once_after_the_timing_of_the_first_launch(noted_timing):
    plan = replace(TINY, launches=2, most_launches=2)
    _, notes = noted_timing(
        ["a", "b"], {"a": 1, "b": 1}, plan, on_first=lambda index, process: process.ask("more", i=index)
    )
    commands = [asked[0] for asked in notes.asked]
    assert [asked for asked in notes.asked if asked[0] == "more"] == [("more", "a", 0), ("more", "b", 1)]
    assert "turn" not in commands[commands.index("more") : commands.index("end")]


# Real processes


def calls_of(folder):
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_each_artifact_lives_in_a_process_of_its_own_and_calls_never_overlap(make_module, bench, tmp_path):
    artifacts = [make_module(name, name=name, does="work") for name in ("one", "two")]
    plan = replace(TINY, launches=2, most_launches=2, rounds=3)
    timings = time_artifacts(artifacts, bench, plan, seed=0)
    assert all(isinstance(timing, Timing) for timing in timings)
    calls = calls_of(tmp_path)
    of = {name: {pid for who, pid, *_ in calls if who == name} for name in ("one", "two")}
    assert len(of["one"]) == len(of["two"]) == 2  # a fresh one at each launch
    assert not of["one"] & of["two"]
    # opening is side by side: a call counts once both processes of its launch have opened
    opened = {pid: min(start for _, p, _, start, _ in calls if p == pid) for pid in of["one"] | of["two"]}
    partners = zip(sorted(of["one"], key=opened.get), sorted(of["two"], key=opened.get), strict=True)
    for pair in partners:
        mine = sorted(
            (start, end) for _, pid, _, start, end in calls if pid in pair and start > max(map(opened.get, pair))
        )
        assert len(mine) > 20
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(mine))


def test_a_program_is_raced_against_a_module(make_module, make_program, bench):
    timings = time_artifacts([make_module("module"), make_program("program")], bench, PLANS["quick"], seed=0)
    assert timings[1].speedup.value > 0
    assert timings[1].speedup.low is None
    assert timings[1].speedup.high is None
    assert timings[1].peak_memory_bytes < timings[0].peak_memory_bytes  # which holds torch


def test_a_damaged_challenger_and_one_that_dies_drop_out_of_a_real_race(make_module, make_program, bench):
    good, damaged, dying = make_program("good"), make_program("damaged"), make_module("dying", does="die_later")
    (damaged / "model.onnx").write_bytes(b"nonsense")
    timings = time_artifacts([good, damaged, dying, good], bench, TINY, seed=0)
    assert "damaged" in timings[1].what
    assert "SIGKILL" in timings[2].why
    assert isinstance(timings[3], Timing)


def test_a_damaged_first_one_is_raised(make_program, bench):
    good, damaged = make_program("good"), make_program("damaged")
    (damaged / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match="is damaged"):
        time_artifacts([damaged, good], bench, TINY, seed=0)


def test_a_challenger_whose_outputs_hold_nan_drops_out(make_module, make_program, bench, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    (inputs / "000000.npz").write_bytes(bench.batches["throughput"].read_bytes())

    def outputs(index, process):
        process.run_samples(inputs, tmp_path / "outputs" / str(index))

    artifacts = [make_program("good"), make_module("nan", does="nan")]
    timings = time_artifacts(artifacts, bench, replace(TINY, throughput_launches=0), seed=0, on_first=outputs)
    assert isinstance(timings[1], ModelError)
    assert "NaN" in timings[1].what
    assert (tmp_path / "outputs" / "0" / "000000.npz").is_file()


def test_launches_with_a_pool_share_its_processes_until_it_ends(make_module, bench, tmp_path, is_alive):
    first, *others = [make_module(name, name=name) for name in ("first", "one", "two")]
    with ProcessPool() as pool:
        timings = [time_artifacts([first, other], replace(bench, pool=pool), TINY, seed=0)[1] for other in others]
        assert all(isinstance(timing, Timing) and timing.speedup.value > 0 for timing in timings)
        of = {name: {pid for who, pid, *_ in calls_of(tmp_path) if who == name} for name in ("first", "one", "two")}
        assert of["one"] == of["two"]
        assert len(of["first"]) == len(of["one"]) == 1
        assert of["first"] != of["one"]
    assert not any(is_alive(pid) for pids in of.values() for pid in pids)


def test_a_process_of_a_pool_that_died_is_replaced_and_one_that_refuses_an_artifact_goes_on(
    make_module, make_program, bench, tmp_path
):
    first, dying, good = make_program("first"), make_module("dying", does="die_later"), make_program("good")
    damaged = make_program("damaged")
    (damaged / "model.onnx").write_bytes(b"nonsense")
    with ProcessPool() as pool:
        timings = [
            time_artifacts([first, other], replace(bench, pool=pool), TINY, seed=0)[1]
            for other in (dying, good, damaged, good)
        ]
    assert [isinstance(timing, Timing) for timing in timings] == [False, True, False, True]
    assert "SIGKILL" in timings[0].why
    assert "damaged" in timings[2].what
