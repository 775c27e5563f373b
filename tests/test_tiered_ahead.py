"""Laws of bringing experts closer ahead of need: no output changes, and no demand waits long."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.errors import ExpertReadError
from moe_runtime.expert import ExpertKey
from moe_runtime.scheduling.miss_plan import Miss, MissPlan, MissWay
from moe_runtime.scheduling.prefetch import AheadPlan, PrefetchCounts
from tests.test_tiered_engine import WORLDS, random_running
from tests.tiered_world import Running

NUM_FORWARDS = 12


class RandomPlanner:
    """Wants anything, as often as it likes, in place of anything: no predictor is worse."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def plan(self, num_in_line: int) -> AheadPlan | None:
        rng, engine = self._running.world.rng, self._running.engine
        if rng.random() < 0.3:
            return None
        keys = [key for key in self._running.world.blobs if key not in engine.cache]
        rng.shuffle(keys)
        return AheadPlan(keys, rng.randrange(5), lambda key, victim: rng.random() < 0.8)


class FixedPlanner:
    """Wants the same keys, while the device lacks them."""

    def __init__(self, running: Running, keys: Sequence[ExpertKey]) -> None:
        self._running, self._keys = running, keys

    def plan(self, num_in_line: int) -> AheadPlan | None:
        keys = [key for key in self._keys if key not in self._running.engine.cache]
        return AheadPlan(keys, len(keys), lambda key, victim: True)


def planned(seed: int, way: MissWay, *sizes: int) -> Running:
    """A random engine whose every layer is followed by reads ahead of anything."""
    running = random_running(seed, way, *sizes)
    running.engine.ahead.planner = RandomPlanner(running)
    return running


def calm(num_slots: int, num_host_slots: int, seed: int = 0) -> Running:
    """An engine on whose fakes nothing happens before it is waited for."""
    running = random_running(seed, MissWay.COPY, num_slots, num_host_slots)
    running.engine.cache.policy = LRUPolicy()
    running.machine.drift = lambda: None  # type: ignore[method-assign]
    return running


def use(running: Running, layer: int, experts: Sequence[int]) -> None:
    """One forward of `layer`."""
    with running.engine.open_layer(layer, experts) as access:
        for expert in experts:
            access.weights(expert)
            access.release(expert)


def settle(running: Running) -> None:
    """Until nothing is under way."""
    running.machine.run_until(lambda: running.machine.is_idle)


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), way=st.sampled_from(MissWay))
def test_reading_ahead_changes_no_output(seed: int, way: MissWay) -> None:
    """Law: whatever comes closer ahead of need, in whatever order, outputs are those of weights."""
    running = planned(seed, way)
    forwards = [running.world.forward() for _ in range(NUM_FORWARDS)]
    for forward in forwards:
        running.run(forward)
        if running.world.rng.random() < 0.3:
            running.check(forward)
    for forward in forwards:
        running.check(forward)
    ahead = running.engine.ahead
    for ledger in (ahead.reads, ahead.copies):
        counts = ledger.counts
        assert counts.used + counts.cancelled + ledger.num_unused <= counts.started
    running.engine.close()
    assert running.machine.is_idle


@settings(max_examples=120)
@given(seed=st.integers(0, 2**32), way=st.sampled_from(MissWay))
def test_troubles_while_reading_ahead(seed: int, way: MissWay) -> None:
    """Law: failed reads and a Ctrl-C at any call leave nothing in flight; then all is right."""
    running = planned(seed, way)
    rng, world = running.world.rng, running.world
    for _ in range(NUM_FORWARDS):
        trouble = rng.choice(["read", "interrupt", None])
        running.source.fail_probability = 0.3 if trouble == "read" else 0.0
        if trouble == "interrupt":
            running.machine.calls_left = rng.randrange(80)
        forward = world.forward()
        try:
            running.run(forward)
        except (ExpertReadError, KeyboardInterrupt):
            pass  # what failed ahead of need may come to be needed later
        else:
            running.machine.calls_left = None
            running.check(forward)
        running.machine.calls_left = None
        running.source.fail_probability = 0.0
        while True:  # reads that were to fail may still be in line
            forward = world.forward()
            try:
                running.run(forward)
            except ExpertReadError:
                continue
            running.check(forward)
            break
    running.engine.close()
    assert running.machine.is_idle
    assert running.source.is_closed


def test_reading_ahead_adds_no_sync() -> None:
    """Law: the host waits for the device once a layer at most, whatever is read ahead."""
    for seed in range(20):
        most = WORLDS[seed % len(WORLDS)].tensor_map.num_experts
        running = planned(seed, MissWay.COPY, max(6, most // 2), most)
        for _ in range(NUM_FORWARDS):
            running.run(running.world.forward())
        counts = running.engine.counts
        assert running.machine.num_waits == counts.num_syncs <= counts.num_layers
        running.engine.close()


def test_an_expert_comes_one_tier_a_time() -> None:
    """Law: what is foretold is read, then copied, and its layer finds it on the device."""
    running, key = calm(6, 6), ExpertKey(1, 0)
    engine = running.engine
    running.read_ahead([key])
    settle(running)
    assert engine.cache.resident() == []
    running.read_ahead([key])
    assert engine.cache.resident() == [key]
    use(running, 1, [0])
    assert (engine.cache.counts[1].hits, engine.cache.counts[1].misses) == (1, 0)
    for ledger in (engine.ahead.reads, engine.ahead.copies):
        assert (ledger.counts.started, ledger.counts.used) == (1, 1)
    engine.close()


def test_one_copy_at_a_time() -> None:
    """Law: a demand finds one copy at most on the link that nobody had asked for."""
    running, keys = calm(9, 9), [ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(1, 0)]
    copies = running.engine.ahead.copies
    for _ in keys:
        running.read_ahead(keys)
    settle(running)
    for number in range(1, len(keys) + 1):
        for _ in range(3):  # nothing is over before it is waited for
            running.read_ahead(keys)
            assert copies.counts.started == number
            assert running.engine.ahead.num_ahead == 1
        settle(running)
        assert running.engine.ahead.num_ahead == 0
    running.engine.close()


def test_a_demand_waits_for_one_piece_of_the_disk() -> None:
    """Law: what a layer demands stands behind one piece at most of what is read ahead."""
    running = calm(9, 9)
    running.read_ahead([ExpertKey(1, 0), ExpertKey(1, 1), ExpertKey(2, 0)])
    reads = running.machine.reads
    assert len(reads) == 1  # of six
    with running.engine.open_layer(0, [0]) as access:
        assert len(reads) == 3  # and both of the demand
        for _ in range(3):  # first come, first served
            reads.pop(0)()
        assert access.is_ready(0)
        access.release(0)
    running.engine.close()


def test_a_demanded_read_is_taken_out_of_the_line() -> None:
    """Law: what is on its way and comes to be needed is read at once, and only once."""
    running, key = calm(9, 9), ExpertKey(1, 1)
    running.read_ahead([ExpertKey(2, 0), key])
    with running.engine.open_layer(1, [1]) as access:
        assert len(running.source.ahead) == 1
        assert len(running.machine.reads) == 3  # the line's, and both halves of the demand
        access.weights(1)
        access.release(1)
    settle(running)
    sizes = [len(running.world.blobs[k]) for k in (key, ExpertKey(2, 0))]
    assert running.source.bytes_read == sum(sizes)
    assert running.engine.ahead.reads.counts.used == 1
    running.engine.close()


def test_a_wrong_read_that_was_not_begun_frees_its_slot() -> None:
    """Law: what was foretold of a layer and is not demanded leaves the line, and host memory."""
    running, wrong = calm(9, 9), ExpertKey(1, 1)
    running.read_ahead([ExpertKey(2, 0), wrong])
    use(running, 1, [0])
    assert wrong not in running.engine.host_cache
    assert running.engine.ahead.reads.counts.cancelled == 1
    settle(running)
    sizes = [len(running.world.blobs[key]) for key in (ExpertKey(1, 0), ExpertKey(2, 0))]
    assert running.source.bytes_read == sum(sizes)
    running.engine.close()


def test_a_wrong_resident_leaves_first() -> None:
    """Law: what came to the device for a layer and is not demanded makes room before all others."""
    running, wrong = calm(3, 9), ExpertKey(1, 1)
    engine = running.engine
    for _ in range(2):
        running.read_ahead([wrong])
        settle(running)
    use(running, 1, [0])
    assert wrong in engine.cache
    use(running, 2, [0, 1])
    assert set(engine.cache.resident()) == {ExpertKey(1, 0), ExpertKey(2, 0), ExpertKey(2, 1)}
    engine.close()


def test_what_the_layer_needs_makes_no_room() -> None:
    """Law: a read ahead while a layer runs takes no slot of its experts, on either tier."""
    for seed in range(20):
        running = random_running(seed, MissWay.COPY, 4, 5)
        engine = running.engine
        with engine.open_layer(0, [0, 1]) as access:
            engine.ahead.planner = FixedPlanner(running, list(running.world.blobs))
            for _ in range(4):
                engine.ahead.look()
            assert access.keys <= set(engine.cache.resident())
            assert access.keys <= set(engine.host_cache.resident())
            for expert in (0, 1):
                access.weights(expert)
                access.release(expert)
        assert engine.ahead.reads.counts.started
        engine.close()


def test_what_a_layer_gave_up_is_not_brought_while_it_runs() -> None:
    """Law: an expert of a wave, whose slot another has by the books, is in use: it stays there."""
    running, other = calm(2, 9), ExpertKey(1, 0)
    engine = running.engine
    engine.cache.policy = StaticPolicy([other])
    num_experts = len(running.world.weights[0])
    keys = [ExpertKey(0, expert) for expert in range(num_experts)]
    use(running, 0, range(num_experts))  # all are in host memory now
    use(running, 1, [0])
    use(running, 2, [0])
    engine.ahead.planner = FixedPlanner(running, keys)
    with engine.open_layer(0, range(num_experts)) as access:
        assert other in engine.cache  # which would make room
        assert any(key not in engine.cache for key in keys)
        engine.ahead.look()
        assert engine.ahead.copies.counts.started == 0
        engine.ahead.planner = None
        for expert in range(num_experts):
            access.weights(expert)
            access.release(expert)
    engine.close()


def test_what_is_worth_its_place_is_asked() -> None:
    """Law: a full cache gives an expert up only where the one who reads ahead says so."""
    running, keys = calm(2, 9), [ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(1, 0)]
    engine = running.engine
    use(running, 0, [0, 1])
    running.read_ahead(keys[2:])
    settle(running)
    asked: list[tuple[ExpertKey, ExpertKey]] = []
    plan = AheadPlan(keys[2:], 1, lambda key, victim: bool(asked.append((key, victim))))
    engine.ahead.read_ahead(plan)
    assert asked == [(keys[2], keys[0])]
    assert set(engine.cache.resident()) == set(keys[:2])
    engine.ahead.read_ahead(AheadPlan(keys[2:], 1, lambda key, victim: True))
    assert set(engine.cache.resident()) == set(keys[1:])
    engine.close()


def test_a_read_that_failed_ahead_of_need_is_read_again() -> None:
    """Law: nobody hears of an error in a read that nobody asked for; a demand reads anew."""
    running, key = calm(9, 9), ExpertKey(1, 0)
    running.source.fail_probability = 1.0
    running.read_ahead([key])
    settle(running)
    running.source.fail_probability = 0.0
    use(running, 1, [0])
    assert running.engine.ahead.reads.counts.wasted == 1.0
    running.engine.close()


def test_what_is_gained_is_counted_in_the_planner_s_costs() -> None:
    """Law: a read or a copy is the part of a demanded expert that it takes of its time."""
    running = calm(9, 9)
    ahead, costs = running.engine.ahead, running.engine.planner.costs
    before = ahead.progress()
    costs.copy.add(0.002)
    costs.read.add(0.006)
    on_host, on_disk = Miss(0, 1), Miss(1, 1, is_on_disk=True)
    plan = MissPlan(copied=(on_host, on_disk), computed=(), seconds=0.01)
    ahead.demanded(plan, 0.004)
    ahead.reads.counts.hidden, ahead.copies.counts.hidden = 1.0, 2.0
    ahead.copies.counts.wasted = 5.0
    times, counts = ahead.since(before)
    assert (times.visits, times.stall_seconds) == (1, 0.004)
    # Two experts took 10 ms, so one of them 5: a read is 6/5 of it, a copy 2/5.
    assert times.fetch_seconds / times.fetched == pytest.approx(0.005)
    assert counts.hidden == pytest.approx(6 / 5 + 2 * 2 / 5)
    assert counts.wasted == pytest.approx(5 * 2 / 5)
    ahead.start_clock()
    assert ahead.since(ahead.progress())[1] == PrefetchCounts()
    running.engine.close()
