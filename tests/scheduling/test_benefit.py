"""Laws of the gate: numbers fed, no clocks. It reads while that gains, and says why."""

import pytest

from moe_runtime.scheduling.benefit import MOST_COST, BenefitGate, ForwardFacts, Mode
from moe_runtime.scheduling.prefetch import PrefetchCounts

READ = 0.010  # seconds of one expert
LAYERS = 6


def facts(
    *,
    hidden: float = 0.0,
    wasted: float = 0.0,
    regrets: int = 0,
    predictor: float = 0.0001,
    idle: float = 0.030,
    stall: float = 0.060,
    read: float | None = READ,
    seconds: float = 0.120,
) -> ForwardFacts:
    return ForwardFacts(
        num_visits=LAYERS,
        seconds=seconds,
        predictor_seconds=predictor,
        stall_seconds=stall,
        idle_seconds=idle,
        read_seconds=read,
        counts=PrefetchCounts(hidden=hidden, wasted=wasted, regrets=regrets),
    )


def fed(found: ForwardFacts, number: int, gate: BenefitGate | None = None) -> BenefitGate:
    gate = gate or BenefitGate(piece_share=0.1)
    for _ in range(number):
        gate.add(found)
    return gate


def test_a_perfect_predictor_is_let_on() -> None:
    """Law: where every read is used and the disk is idle, a trial ends in reading."""
    gate = BenefitGate(piece_share=0.1)
    assert gate.mode is Mode.TRIAL
    assert gate.is_listening
    assert not gate.is_on
    fed(facts(hidden=3.0), 20, gate)
    assert gate.is_on
    report = gate.report()
    # 3 reads of 10 ms hidden in 30 ms idle, less the predictor's 0.1 ms, over 6 layers.
    assert report["expected_gain_ms_per_layer"] == pytest.approx(29.9 / LAYERS)
    assert report["realised_gain_ms_per_layer"] == pytest.approx(29.9 / LAYERS)
    assert report["precision"] == 1.0
    assert "expected gain 4.983 ms a layer" in str(report["why"])


def test_a_useless_predictor_is_turned_off() -> None:
    """Law: a trial in which nothing foretold is used ends with the predictor silent."""
    gate = fed(facts(wasted=3.0), 20)
    assert gate.mode is Mode.OFF
    assert not gate.is_listening
    assert "expected gain -" in str(gate.report()["why"])
    assert gate.report()["precision"] == 0.0


def test_the_gain_is_bounded_by_overlap() -> None:
    """Law: no more is gained than the disk is idle, nor than compute waits."""
    for bound in ("idle", "stall"):
        gate = fed(facts(hidden=50.0, **{bound: 0.012}), 20)  # type: ignore[arg-type]
        gain = gate.report()["expected_gain_ms_per_layer"]
        assert gain == pytest.approx((12.0 - 0.1) / LAYERS)
    assert not fed(facts(hidden=50.0, stall=0.0), 20).is_on
    assert not fed(facts(hidden=50.0, read=None), 20).is_on


def test_wasted_bytes_and_regrets_count_against_it() -> None:
    """Law: a wrong read costs a piece that demand waits for, and a read of whom it displaced."""
    clean = fed(facts(hidden=2.0), 20).report()["expected_gain_ms_per_layer"]
    wrong = fed(facts(hidden=2.0, wasted=1.0), 20).report()["expected_gain_ms_per_layer"]
    sorry = fed(facts(hidden=2.0, regrets=1), 20).report()["expected_gain_ms_per_layer"]
    assert isinstance(clean, float)
    assert wrong == pytest.approx(clean - 0.1 * 1e3 * READ / LAYERS)
    assert sorry == pytest.approx(clean - 1e3 * READ / LAYERS)


def test_a_predictor_that_costs_too_much_is_turned_off() -> None:
    """Law: over 2 % of a step a predictor is silent, however right it is, and not soon asked."""
    gate = fed(facts(hidden=3.0, predictor=0.120 * 1.2 * MOST_COST), 20)
    assert gate.mode is Mode.OFF
    assert "2.4% of a step, over 2%" in str(gate.report()["why"])
    assert fed(facts(hidden=3.0), 500, gate).mode is Mode.OFF


def test_a_hopeless_cost_ends_the_trial() -> None:
    """Law: a predictor that costs far too much is silent before a trial is through."""
    assert fed(facts(hidden=3.0, predictor=0.02), 4).mode is Mode.OFF


def test_it_stops_when_it_loses_and_tries_again() -> None:
    """Law: on, it goes off below zero, not at once; after a pause it tries, and can come back."""
    gate = fed(facts(hidden=3.0), 20)
    fed(facts(wasted=3.0, regrets=2), 1, gate)
    assert gate.is_on  # one bad forward is none
    fed(facts(wasted=3.0, regrets=2), 40, gate)
    assert gate.mode is Mode.OFF
    modes = set()
    for _ in range(200):
        gate.add(facts(hidden=3.0))
        modes.add(gate.mode)
    assert modes == {Mode.OFF, Mode.TRIAL, Mode.ON}
    assert gate.is_on


def test_a_small_gain_does_not_start_it_and_does_not_stop_it() -> None:
    """Law: between nothing and the least gain the gate stays as it is."""
    small = facts(hidden=0.05)  # 0.4 ms of a step of 120
    assert fed(small, 20).mode is Mode.OFF
    gate = fed(facts(hidden=3.0), 20)
    assert fed(small, 400, gate).is_on


def test_pauses_grow() -> None:
    """Law: the longer it was useless, the rarer it is tried: 1 % of forwards in the end."""
    gate = BenefitGate(piece_share=0.1)
    spoken = []
    for _ in range(12_000):
        spoken.append(gate.is_listening)
        gate.add(facts(wasted=3.0))
    assert sum(spoken[-6000:]) <= 60


def test_failing_is_for_good() -> None:
    """Law: after fail() it is off and says why."""
    gate = fed(facts(hidden=3.0), 20)
    gate.fail("predictor x failed: ValueError: no")
    assert fed(facts(hidden=3.0), 5000, gate).mode is Mode.OFF
    assert gate.report()["why"] == "predictor x failed: ValueError: no"


def test_a_state_goes_on_where_it_was() -> None:
    """Law: a gate restored from another's state decides as that did; damaged state is refused."""
    gate = fed(facts(hidden=3.0), 40)
    other = BenefitGate(piece_share=0.1)
    other.restore(gate.state())
    assert other.is_on
    assert other.read_seconds == gate.read_seconds
    fresh = BenefitGate(piece_share=0.1)
    fresh.restore(fed(facts(wasted=3.0), 20).state())
    assert fresh.mode is Mode.TRIAL  # it may do better now
    for broken in (
        {},
        {"mode": "no", "pause": 64, "means": {}},
        {"mode": "on", "pause": "x", "means": {}},
        {"mode": "on", "pause": 64, "means": {"read": float("nan")}},
    ):
        with pytest.raises((KeyError, TypeError, ValueError)):
            BenefitGate(piece_share=0.1).restore(broken)


def test_compute_that_slows_down_beside_reads_is_a_cost() -> None:
    """Law: what is saved waiting and lost computing is no gain, and ends the reads."""
    gate = fed(facts(hidden=3.0, stall=0.060), 10)
    assert gate.is_on
    # 30 ms less waiting and 20 ms more computing.
    for _ in range(20):
        gate.add(facts(hidden=3.0, stall=0.030, seconds=0.110))
    assert gate.is_on
    assert gate.report()["expected_gain_ms_per_layer"] == pytest.approx(9.9 / LAYERS, rel=0.02)
    for _ in range(200):
        gate.add(facts(hidden=3.0, stall=0.030, seconds=0.130))
        if not gate.is_on:
            break
    assert not gate.is_on
    assert "expected gain -" in str(gate.report()["why"])
