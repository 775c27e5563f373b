"""Laws of reading ahead in the engine: it never changes an output, and leaves nothing behind."""

import random
import signal
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType

import pytest
import torch

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.engine import ExpertEngine
from moe_runtime.errors import ExpertReadError
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.ahead_line import AheadLine
from moe_runtime.scheduling.prefetch import AheadPlan, PrefetchLedger
from tests.interruption import NEVER, Interruption
from tests.test_engine import (
    NUM_LAYERS,
    Forward,
    Interrupting,
    RandomReader,
    World,
    make_world,
    running,
)

NUM_WORLDS = 6
NUM_ENGINES, PER_ENGINE = 60, 25


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[World]:
    return [make_world(tmp_path_factory.mktemp("experts"), seed) for seed in range(NUM_WORLDS)]


def absent_keys(world: World, engine: ExpertEngine) -> list[ExpertKey]:
    keys = [
        ExpertKey(layer, expert)
        for layer, experts in enumerate(world.weights)
        for expert in range(len(experts))
    ]
    return [key for key in keys if key not in engine.cache]


class RandomPlanner:
    """Wants anything, as often as it likes, in place of anything: no predictor is worse."""

    def __init__(self, world: World, engine: ExpertEngine, rng: random.Random) -> None:
        self._world, self._engine, self._rng = world, engine, rng

    def plan(self, num_in_line: int) -> AheadPlan | None:
        if self._rng.random() < 0.3:
            return None
        keys = absent_keys(self._world, self._engine)
        self._rng.shuffle(keys)
        return AheadPlan(keys, self._rng.randrange(4), lambda key, victim: self._rng.random() < 0.8)


class FixedPlanner:
    """Wants the same keys, while they are absent."""

    def __init__(self, engine: ExpertEngine, keys: list[ExpertKey]) -> None:
        self._engine, self._keys = engine, keys

    def plan(self, num_in_line: int) -> AheadPlan | None:
        keys = [key for key in self._keys if key not in self._engine.cache]
        return AheadPlan(keys, len(keys), lambda key, victim: True)


@pytest.mark.timeout(200)
def test_reading_ahead_changes_no_output(worlds: list[World]) -> None:
    """Law: whatever is read ahead, into poisoned slots, each output is that of whole weights.

    In a third of the engines reads fail or calls are interrupted now and then.
    """
    threads = threading.active_count()
    rng, generator = random.Random(21), torch.Generator().manual_seed(21)
    num_ahead = num_raised = 0
    for number in range(NUM_ENGINES):
        world = worlds[number % len(worlds)]
        is_troubled = number % 3 == 2
        with running(world, rng, shuffled=number % 2 == 0) as engine:
            engine.planner = RandomPlanner(world, engine, rng)
            for _ in range(PER_ENGINE):
                forward = Forward.random(world, rng, generator)
                assert isinstance(engine.reader, RandomReader)
                trouble = rng.choice(["read", "interrupt", None]) if is_troubled else None
                engine.reader.fail_probability = 0.2 if trouble == "read" else 0.0
                try:
                    found = forward.run(
                        world,
                        engine,
                        (lambda a: Interrupting(a, rng)) if trouble == "interrupt" else lambda a: a,
                    )
                except (ExpertReadError, KeyboardInterrupt):
                    assert is_troubled  # what failed ahead of need may come to be needed later
                    num_raised += 1
                    continue
                assert torch.equal(found, forward.expected_TD), (number, forward.layer)
            num_ahead += engine.ledger.counts.started
            counts = engine.ledger.counts
            assert counts.used + counts.cancelled + engine.ledger.num_unused <= counts.started
    assert num_ahead > 500
    assert num_raised > 10
    assert threading.active_count() == threads


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # hit a finalizer
def test_interrupts_at_any_instruction_while_reading_ahead(worlds: list[World]) -> None:
    """Law: a Ctrl-C at any moment leaves no wrong expert behind, no thread and no lock."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    threads = threading.active_count()
    rng, generator = random.Random(23), torch.Generator().manual_seed(23)
    num_interrupted = 0
    try:
        for number in range(24):
            world = worlds[number % len(worlds)]
            with running(world, rng, shuffled=False) as engine:
                engine.planner = RandomPlanner(world, engine, rng)
                for _ in range(12):
                    forward = Forward.random(world, rng, generator)
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 1e-6 + 3e-3 * rng.random())
                        for _ in range(20):
                            forward.run(world, engine)
                        signal.setitimer(signal.ITIMER_REAL, 0)
                    except KeyboardInterrupt:
                        num_interrupted += 1
                    Forward.random(world, rng, generator).check(world, engine)
                    forward.check(world, engine)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert num_interrupted > 50
    assert threading.active_count() == threads


INTERRUPTIBLE = [
    (ExpertEngine, "_begin_ahead"), (ExpertEngine, "_start_ahead"), (ExpertEngine, "_correct"),
    (ExpertEngine, "_give_up"), (ExpertEngine, "_demand"), (ExpertEngine, "_leave_slot"),
    (AheadLine, "append"), (AheadLine, "promote"), (AheadLine, "cancel"), (AheadLine, "demote"),
    (ExpertCache, "prefetch"), (ExpertCache, "demote"), (ExpertCache, "discard"),
    (PrefetchLedger, "start"), (PrefetchLedger, "visit"), (PrefetchLedger, "leave"),
]  # fmt: skip


# Steps that are taken only if a read is caught on its way.
TIMED = {"_give_up", "promote", "cancel", "demote", "discard", "leave"}


@pytest.mark.parametrize(("owner", "name"), INTERRUPTIBLE, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupt_between_steps_of_reading_ahead(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch, owner: type, name: str, when: str
) -> None:
    """Law: an interrupt before or after any step leaves the engine right."""
    rng, generator = random.Random(24), torch.Generator().manual_seed(24)
    interruption = Interruption(monkeypatch, owner, name, when)
    num_interrupted = 0
    for world in worlds[:3]:
        with running(world, rng, num_slots=4, shuffled=False) as engine:
            engine.cache.policy = LRUPolicy()
            engine.planner = RandomPlanner(world, engine, rng)
            for _ in range(16):
                interruption.calls_left = rng.choice([1, 1, 2, 4])
                try:
                    Forward.random(world, rng, generator).check(world, engine)
                except KeyboardInterrupt:
                    num_interrupted += 1
                interruption.calls_left = NEVER
                Forward.random(world, rng, generator).check(world, engine)
    assert num_interrupted > 0 or name in TIMED


def test_what_the_layer_needs_is_never_given_up(worlds: list[World]) -> None:
    """Law: a read ahead takes no slot of an expert of the layer that runs."""
    rng, generator = random.Random(25), torch.Generator().manual_seed(25)
    world = worlds[0]
    with running(world, rng, num_slots=max(map(len, world.weights))) as engine:
        engine.planner = RandomPlanner(world, engine, rng)
        for _ in range(60):
            forward = Forward.random(world, rng, generator)
            keys = [ExpertKey(forward.layer, expert) for expert in forward.dispatch.experts]
            with engine.open_layer(forward.layer, forward.dispatch.experts):
                assert all(key in engine.cache for key in keys)
        assert engine.ledger.counts.started > 20


def test_what_a_layer_gave_up_is_not_read_ahead_while_it_runs(worlds: list[World]) -> None:
    """Law: an expert that a wave will push out of its slot is not fetched into another meanwhile.

    Its release would take back that read, and leave the expert in the books with no bytes.
    """
    rng, generator = random.Random(31), torch.Generator().manual_seed(31)
    for world in worlds:
        with running(world, rng, num_slots=2, shuffled=False) as engine:
            engine.cache.policy = StaticPolicy([ExpertKey(1, 0)])
            keys = [ExpertKey(0, expert) for expert in range(len(world.weights[0]))]
            engine.planner = FixedPlanner(engine, keys)
            for _ in range(12):
                with engine.open_layer(1, [0]) as access:
                    access.weights(0)
                forward = Forward.random(world, rng, generator)
                if forward.layer == 0:
                    forward.check(world, engine)
            assert engine.ledger.counts.started


class HeldPool:
    """Runs nothing before it is told to."""

    def __init__(self) -> None:
        self.jobs: deque[Callable[[], object]] = deque()

    def submit(self, job: Callable[[], object]) -> None:
        self.jobs.append(job)

    def run(self, number: int = 10**9) -> None:
        while self.jobs and number:
            self.jobs.popleft()()
            number -= 1

    def shutdown(self) -> None:
        self.run()


def held(engine: ExpertEngine) -> HeldPool:
    """From here on nothing is read before it is told to."""
    engine.reader._pool.shutdown()
    pool = HeldPool()
    engine.reader._pool = pool  # type: ignore[assignment]
    engine.reader.ahead = AheadLine(pool)  # type: ignore[arg-type]
    return pool


def test_a_wrong_read_that_was_not_begun_frees_its_slot(worlds: list[World]) -> None:
    """Law: what was foretold of a layer and is not demanded leaves its slot before it is read."""
    rng, world = random.Random(26), worlds[0]
    with running(world, rng, num_slots=6) as engine:
        pool = held(engine)
        engine.read_ahead(AheadPlan([ExpertKey(0, 0), ExpertKey(0, 1)], 2, lambda k, v: True))
        assert len(engine.cache) == 2
        bytes_before = engine.reader.bytes_read
        with engine.open_layer(0, [0]) as access:
            assert ExpertKey(0, 1) not in engine.cache
            assert len(engine.reader.ahead) == 0
            pool.run()
            access.weights(0)
        assert engine.ledger.counts.cancelled == 1
        assert engine.ledger.counts.used == 1
        assert len(engine.cache) == 1
        one = sum(extent.num_bytes for extent in world.tensor_map.extents(ExpertKey(0, 0)))
        blocks = 2 * 4096 * len(world.tensor_map.extents(ExpertKey(0, 0)))
        assert engine.reader.bytes_read - bytes_before <= one + blocks


def test_a_wrong_read_under_way_goes_last_and_leaves_first(worlds: list[World]) -> None:
    """Law: what was begun and is not demanded stays behind all others, and is the next victim."""
    rng, world = random.Random(27), worlds[0]
    wrong, right = ExpertKey(0, 1), ExpertKey(1, 0)
    with running(world, rng, num_slots=3) as engine:
        engine.cache.policy = LRUPolicy()
        pool = held(engine)
        engine.read_ahead(AheadPlan([wrong, right], 2, lambda k, v: True))
        engine._ahead[wrong].pieces.append(lambda: None)  # so that one piece is not all of it
        engine._ahead[wrong].load._remaining += 1
        engine._ahead[wrong].num_pieces += 1
        pool.run(1)
        assert engine._ahead[wrong].has_started
        with engine.open_layer(0, [0]) as access:
            assert wrong in engine.cache
            pool.run()
            access.weights(0)
        assert engine.cache._victim(frozenset()) == wrong


def test_a_demanded_read_ahead_is_promoted(worlds: list[World]) -> None:
    """Law: what is on its way and comes to be needed is a hit, and read before other misses."""
    rng, world = random.Random(28), worlds[0]
    with running(world, rng, num_slots=4) as engine:
        pool = held(engine)
        engine.read_ahead(AheadPlan([ExpertKey(0, 1)], 1, lambda k, v: True))
        load = engine._loads[ExpertKey(0, 1)]
        with engine.open_layer(0, [0, 1]) as access:
            while not load.is_done:
                assert not access.is_ready(0)
                pool.run(1)
            assert access.is_ready(1)
            pool.run()
            access.weights(0)
            access.weights(1)
        assert (engine.cache.counts[0].hits, engine.cache.counts[0].misses) == (1, 1)
        assert engine.ledger.counts.used == 1


def test_a_read_that_failed_ahead_of_need_is_read_again(worlds: list[World]) -> None:
    """Law: nobody hears of an error in a read that nobody asked for; a demand reads anew."""
    rng, generator = random.Random(29), torch.Generator().manual_seed(29)
    world = worlds[1]
    with running(world, rng, num_slots=world.tensor_map.num_experts, shuffled=False) as engine:
        assert isinstance(engine.reader, RandomReader)
        engine.reader.fail_probability = 1.0
        plan = AheadPlan(absent_keys(world, engine), 99, lambda k, v: True)
        engine.read_ahead(plan)
        for load in list(engine._loads.values()):
            load.settle()
            assert not load.has_arrived
        engine.reader.fail_probability = 0.0
        for _ in range(10):
            Forward.random(world, rng, generator).check(world, engine)


def test_a_planted_pattern_gains_hits(worlds: list[World]) -> None:
    """Law: layers that use in turn what is read ahead of them miss nothing that was foretold."""
    rng = random.Random(30)
    world = worlds[0]
    misses = {}
    for is_planned in (False, True):
        with running(world, rng, num_slots=2, shuffled=False) as engine:
            engine.cache.policy = LRUPolicy()
            for step in range(12):
                for layer in range(NUM_LAYERS):
                    expert = step % len(world.weights[layer])
                    following = ExpertKey((layer + 1) % NUM_LAYERS, 0)
                    after = step + (layer + 1) // NUM_LAYERS
                    following = following._replace(
                        expert=after % len(world.weights[following.layer])
                    )
                    if is_planned:
                        engine.planner = FixedPlanner(engine, [following])
                    with engine.open_layer(layer, [expert]) as access:
                        found = access.weights(expert)
                        for name, value in world.weights[layer][expert].items():
                            assert torch.equal(found[name], value)
            misses[is_planned] = sum(c.misses for c in engine.cache.counts.values())
    assert misses[False] == 12 * NUM_LAYERS
    assert misses[True] == 1  # the first of all


@pytest.mark.parametrize("num_run", [0, 1, 3])
def test_close_with_reads_ahead_under_way(worlds: list[World], num_run: int) -> None:
    """Law: close() ends threads and reads, however many were begun, and nothing writes after it."""
    rng, world = random.Random(31), worlds[0]
    threads = threading.active_count()
    with running(world, rng, num_slots=6, shuffled=False) as engine:
        plan = AheadPlan(absent_keys(world, engine)[:6], num_run, lambda k, v: True)
        engine.read_ahead(plan)
        engine.close()
        assert threading.active_count() == threads
        assert len(engine.reader.ahead) == 0
        engine.read_ahead(plan)  # does nothing
        assert len(engine.reader.ahead) == 0


def test_an_error_in_a_layer_gives_up_what_is_ahead(worlds: list[World]) -> None:
    """Law: after an error no read ahead is left, and its slots are free."""
    rng, world = random.Random(32), worlds[0]
    with running(world, rng, num_slots=6) as engine:
        pool = held(engine)
        engine.read_ahead(AheadPlan([ExpertKey(1, 0)], 1, lambda k, v: True))

        def fail() -> None:
            with engine.open_layer(0, [0]):
                pool.run()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert len(engine.reader.ahead) == 0
        assert not engine._ahead


def test_warm_reads_fill_free_slots_and_nothing_else(worlds: list[World]) -> None:
    """Law: a warm start takes free slots only, hottest first, and the hottest leaves last."""
    rng, world = random.Random(33), worlds[0]
    keys = [ExpertKey(0, 0), ExpertKey(1, 1), ExpertKey(1, 0), ExpertKey(0, 1)]
    with running(world, rng, num_slots=3, shuffled=False) as engine:
        engine.cache.policy = LRUPolicy()
        with engine.open_layer(0, [1]) as access:
            access.weights(1)
        engine.warm(keys)
        assert ExpertKey(0, 1) in engine.cache
        assert len(engine.cache) == 3
        for key in keys[:2]:
            engine._loads[key].settle()
            with engine.open_layer(key.layer, [key.expert]) as access:
                found = access.weights(key.expert)
                for name, value in world.weights[key.layer][key.expert].items():
                    assert torch.equal(found[name], value)
        assert engine.cache.counts[1].misses == 0
        assert engine.ledger.counts.started == 0
        assert set(engine.give_up_all()) == {*keys[:2], ExpertKey(0, 1)}
