"""Laws of simulated time: lanes do one thing at a time, and nothing beats its bounds."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.predictions import Predictions
from moe_runtime.expert import ExpertKey
from moe_runtime.perf.step_cost import StepCost
from moe_runtime.predictors.predictor import ModelFacts
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.advice import advice
from moe_runtime.simulate.replay import replay_all
from moe_runtime.simulate.timeline import Lanes, ReadPace, play
from moe_runtime.simulate.timelines import play_all
from moe_runtime.trace import Trace
from tests.simulate.oracle import Oracle
from tests.simulate.traces import make_trace

ROUNDING = 1e-9  # seconds; sums of a few thousand floats of order 1
POLICIES = ["lru", "lfu", "adapmoe", "plec", "belady"]

seconds = st.floats(0.0, 1.0)
costs = st.builds(
    StepCost,
    dense_seconds=seconds,
    expert_seconds=seconds,
    read_seconds=seconds,
    copy_seconds=st.one_of(st.just(0.0), seconds),
)
traces = st.builds(
    make_trace,
    st.integers(0, 1000),
    num_tokens=st.integers(1, 20),
    rows_per_step=st.sampled_from([1, 4]),
)


@given(trace=traces, cost=costs, slots=st.integers(1, 20))
@settings(max_examples=50)
def test_lanes_never_overlap_themselves(trace: Trace, cost: StepCost, slots: int) -> None:
    """Law: a lane does one thing at a time, in order, prefetching or not; times add up."""
    accesses = Accesses.of(trace)
    for is_prefetching in (False, True):
        lanes = Lanes()
        policy = PLECPolicy(trace.num_layers, trace.num_experts)
        found = play(
            accesses.visits(), policy, slots, cost, is_prefetching=is_prefetching, lanes=lanes
        )
        for lane, total in (
            (lanes.compute, found.compute_seconds),
            (lanes.disk, found.disk_seconds),
            (lanes.copy, found.copy_seconds),
        ):
            assert all(end <= start for (_, end), (start, _) in pairwise(lane))
            assert sum(end - start for start, end in lane) == pytest.approx(total, abs=ROUNDING)
        assert found.bytes_fetched_experts == found.misses + found.prefetches
        if not is_prefetching:  # a read ahead may be stopped and taken up again
            assert len(lanes.disk) == found.misses
        assert found.disk_seconds <= found.bytes_fetched_experts * cost.read_seconds + ROUNDING
        assert len(lanes.compute) == len(accesses) + len(accesses.bounds) - 1
        assert 0 <= found.wasted <= found.prefetches
        assert found.hits + found.misses == len(accesses)
        assert found.stall_seconds >= 0


@given(trace=traces, cost=costs, slots=st.integers(1, 20))
@settings(max_examples=50)
def test_nothing_beats_its_bounds(trace: Trace, cost: StepCost, slots: int) -> None:
    """Law: no policy and no predictor takes less than perfect prediction, nor that than compute."""
    for result in play_all(Accesses.of(trace), trace, slots=[slots], policies=POLICIES, cost=cost):
        found = result.timeline
        assert found.seconds >= result.perfect_prediction_seconds - ROUNDING
        assert result.perfect_prediction_seconds >= result.infinite_bandwidth_seconds
        assert found.stall_seconds == pytest.approx(
            found.seconds - result.infinite_bandwidth_seconds, abs=ROUNDING
        )


@given(seed=st.integers(0, 1000), cost=costs, slots=st.integers(1, 20))
@settings(max_examples=40)
def test_a_predictor_that_knows_all_does_not_beat_the_bound(
    seed: int, cost: StepCost, slots: int
) -> None:
    """Law: told the truth and fetching ahead, perfect prediction stays the bound."""
    trace = make_trace(seed, num_tokens=15)
    oracle = Oracle.fit(trace, ModelFacts.of(trace))
    results = play_all(
        Accesses.of(trace), trace, slots=[slots], policies=["plec"], cost=cost, predictor=oracle
    )
    assert [result.is_prefetching for result in results] == [False, True]
    for result in results:
        assert result.predictor == "oracle"
        assert result.timeline.seconds >= result.perfect_prediction_seconds - ROUNDING


@given(trace=traces, cost=costs, slots=st.integers(1, 20))
@settings(max_examples=50)
def test_infinite_bandwidth_is_compute_only(trace: Trace, cost: StepCost, slots: int) -> None:
    """Law: with reads and copies in no time nothing stalls, to the last bit."""
    instant = replace(cost, read_seconds=0.0, copy_seconds=0.0)
    for result in play_all(
        Accesses.of(trace), trace, slots=[slots], policies=POLICIES, cost=instant
    ):
        assert result.timeline.seconds == result.infinite_bandwidth_seconds
        assert result.timeline.stall_seconds == 0.0


@given(
    trace=traces,
    cost=costs,
    slots=st.integers(1, 20),
    share=st.floats(0.0, 1.0),
    policy=st.sampled_from(POLICIES),
)
@settings(max_examples=100)
def test_more_bandwidth_is_never_slower_without_prefetching(
    trace: Trace, cost: StepCost, slots: int, share: float, policy: str
) -> None:
    """Law: what is read does not depend on time, so faster lanes end no later.

    With prefetching it does: a faster lane may find time for a read that turns out useless.
    """
    faster = replace(
        cost, read_seconds=share * cost.read_seconds, copy_seconds=share * cost.copy_seconds
    )
    slow, fast = (
        play_all(Accesses.of(trace), trace, slots=[slots], policies=[policy], cost=each)[0].timeline
        for each in (cost, faster)
    )
    assert fast.seconds <= slow.seconds + ROUNDING
    assert fast.misses == slow.misses


@given(trace=traces, cost=costs, slots=st.integers(1, 20))
@settings(max_examples=50)
def test_without_prefetching_hits_are_those_of_the_replay(
    trace: Trace, cost: StepCost, slots: int
) -> None:
    """Law: time changes nothing about who is evicted."""
    accesses = Accesses.of(trace)
    replayed = replay_all(accesses, slots=[slots], policies=POLICIES)
    played = play_all(accesses, trace, slots=[slots], policies=POLICIES, cost=cost)
    for one, other in zip(replayed, played, strict=False):
        assert (one.policy, one.hits, one.misses) == (
            other.policy,
            other.timeline.hits,
            other.timeline.misses,
        )


def test_worked_example() -> None:
    """Law: a miss is read behind the one before it, while what is there computes."""
    cost = StepCost(dense_seconds=1.0, expert_seconds=2.0, read_seconds=3.0, copy_seconds=0.5)
    a, b, c = (ExpertKey(0, e) for e in range(3))
    lanes = Lanes()
    found = play([[a, b], [a, c]], LRUPolicy(), 3, cost, lanes=lanes)
    # Dense 0-1; a is read 1-4 and copied 4-4.5, b 4-7 and 7-7.5; computed 4.5-6.5 and 7.5-9.5.
    # Dense 9.5-10.5; a computes 10.5-12.5 while c is read 10.5-13.5 and copied; then to 16.
    assert lanes.disk == [(1.0, 4.0), (4.0, 7.0), (10.5, 13.5)]
    assert lanes.copy == [(4.0, 4.5), (7.0, 7.5), (13.5, 14.0)]
    assert found.seconds == 16.0
    assert found.compute_seconds == 10.0
    assert found.stall_seconds == 6.0
    assert found.num_steps == 2


@pytest.mark.parametrize(
    ("read_seconds", "disk", "total"),
    [
        # Dense 0-4; a is read 4-6, to be computed by 7. b is read from 6 on at half speed, so a is
        # computed by 8, b read by 10; the dense part's 4 seconds take to 13, and b computes to 14.
        (2.0, [(4.0, 6.0), (6.0, 8.0), (8.0, 10.0)], 14.0),
        # a is read 4-10, computed by 12. The dense part would end at 16 and takes to 20 beside the
        # read, of which 5 are done then: the last one is waited for.
        (6.0, [(4.0, 10.0), (10.0, 12.0), (12.0, 20.0), (20.0, 21.0)], 22.0),
    ],
)
def test_worked_example_of_a_read_beside_compute(
    read_seconds: float, disk: list[tuple[float, float]], total: float
) -> None:
    """Law: a read ahead and the compute beside it have each their share of their speed."""
    cost = StepCost(
        dense_seconds=4.0,
        expert_seconds=1.0,
        read_seconds=read_seconds,
        copy_seconds=0.0,
        compute_share=0.5,
        read_share=0.5,
    )
    a, b = ExpertKey(0, 0), ExpertKey(1, 0)
    lanes = Lanes()
    found = play(
        [[a], [b]],
        LRUPolicy(),
        2,
        cost,
        advice=[Predictions.of({b: 1.0}, (2, 1))] * 2,
        is_prefetching=True,
        lanes=lanes,
    )
    assert lanes.disk == disk
    assert found.seconds == total
    assert found.hits == 1
    for lane in (lanes.compute, lanes.disk):
        assert all(end <= start for (_, end), (start, _) in pairwise(lane))


def test_worked_example_of_a_piece_under_way() -> None:
    """Law: a demand waits for the piece of the read ahead that it finds under way, and no more."""
    cost = StepCost(
        dense_seconds=4.0,
        expert_seconds=1.0,
        read_seconds=6.0,
        copy_seconds=0.0,
        outer_seconds=3.0,
        piece_seconds=2.0,
    )
    a, b, c = (ExpertKey(layer, 0) for layer in range(3))
    lanes = Lanes()
    found = play(
        [[a], [b]],
        LRUPolicy(),
        3,
        cost,
        advice=[Predictions.of({c: 1.0}, (3, 1))] * 2,
        is_prefetching=True,
        lanes=lanes,
    )
    # Outside 0-3, dense 3-7; a is read 7-13, computed 13-14, dense 14-18. c is read from 13 on, and
    # 5 of its 6 seconds are done then: its third piece ends at 19, and b is read 19-25.
    assert lanes.disk == [(7.0, 13.0), (13.0, 14.0), (14.0, 18.0), (18.0, 19.0), (19.0, 25.0)]
    assert found.seconds == 26.0
    assert found.compute_seconds == 13.0


def test_reads_ahead_go_on_outside_the_layers() -> None:
    """Law: what follows a step's last layer is compute, beside which what was planned is read."""
    cost = StepCost(dense_seconds=1.0, expert_seconds=1.0, read_seconds=6.0, copy_seconds=0.0)
    a, b = ExpertKey(0, 0), ExpertKey(0, 1)
    stalls = []
    for outer_seconds in (0.0, 10.0):
        found = play(
            [[a], [b]],
            LRUPolicy(),
            2,
            replace(cost, outer_seconds=outer_seconds),
            advice=[Predictions.of({b: 1.0}, (1, 2))] * 2,
            is_prefetching=True,
        )
        assert found.compute_seconds == 4.0 + 2 * outer_seconds
        stalls.append(found.stall_seconds)
    # a is waited for 6 seconds; of b's 6 all but 2 are waited for, or none.
    assert stalls == [10.0, 6.0]


def test_how_much_is_read_ahead_follows_from_earlier_forwards() -> None:
    """Law: before one has ended a read at a time is begun; later as many as fit idle times."""
    pace = ReadPace()
    assert pace.reads_that_fit == 1
    pace.add(idle_seconds=5.0, num_read=2, fetch_seconds=4.0)
    pace.add(idle_seconds=4.0, num_read=0, fetch_seconds=0.0)
    assert pace.reads_that_fit == 1
    pace.end_forward()
    assert pace.reads_that_fit == 3  # reads of 2 seconds, idle for 4.5


@given(
    trace=traces,
    cost=costs,
    slots=st.integers(1, 20),
    shares=st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 1.0)),
)
@settings(max_examples=50)
def test_company_makes_nothing_faster(
    trace: Trace, cost: StepCost, slots: int, shares: tuple[float, float]
) -> None:
    """Law: no run without reads ahead changes, and none with them computes less."""
    shared = replace(cost, compute_share=shares[0], read_share=shares[1])
    for is_prefetching in (False, True):
        alone, beside = (
            play(
                Accesses.of(trace).visits(),
                PLECPolicy(trace.num_layers, trace.num_experts),
                slots,
                each,
                is_prefetching=is_prefetching,
            )
            for each in (cost, shared)
        )
        assert beside.compute_seconds >= alone.compute_seconds - ROUNDING
        assert beside.stall_seconds >= 0
        if not is_prefetching:
            assert beside == alone


def test_knowing_ahead_and_fetching_ahead_takes_stalls_away() -> None:
    """Law: where compute leaves the disk time, fetching what is foretold is faster than waiting."""
    trace = make_trace(1, num_tokens=200)
    oracle = Oracle.fit(trace, ModelFacts.of(trace))
    cost = StepCost(dense_seconds=4.0, expert_seconds=0.1, read_seconds=1.0, copy_seconds=0.0)
    waiting, ahead = (
        result.timeline
        for result in play_all(
            Accesses.of(trace), trace, slots=[12], policies=["plec"], cost=cost, predictor=oracle
        )
    )
    assert ahead.stall_seconds < 0.5 * waiting.stall_seconds
    assert ahead.prefetches > 0
    told = list(advice(oracle, trace))
    assert len(told) == len(Accesses.of(trace).bounds) - 1
