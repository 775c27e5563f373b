"""Laws of the tiers: whatever order streams and disk take, every expert computes with its bytes."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.engine import Weights
from moe_runtime.errors import ExpertReadError, OffloadedExpertsError
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.device_room import DeviceRoom
from moe_runtime.memory.device_slots import DeviceSlots
from moe_runtime.memory.pinned_slots import PinnedSlots
from moe_runtime.scheduling.miss_plan import MissWay
from moe_runtime.tiered_engine import TieredEngine
from tests.fake_streams import FakeMachine, FakeStream
from tests.tiered_world import Forward, Running, TieredWorld, needs_interpreter

NUM_FORWARDS = 12

WORLDS = [TieredWorld(random.Random(seed)) for seed in range(6)]
DTYPES = {"fp8": torch.float32, "mxfp4": torch.float32, "packed": torch.bfloat16}
STORED_WORLDS = {
    form: [TieredWorld(random.Random(seed), dtype, form) for seed in range(3)]  # type: ignore[arg-type]
    for form, dtype in DTYPES.items()
}


def random_running(
    seed: int,
    way: MissWay,
    num_slots: int | None = None,
    num_host_slots: int | None = None,
    *,
    is_grouped: bool = False,
    worlds: Sequence[TieredWorld] = WORLDS,
) -> Running:
    """An engine with random sizes over one of the worlds; repeatable."""
    rng = random.Random(seed)
    world = worlds[seed % len(worlds)]
    world.rng = rng
    world.generator.manual_seed(seed)
    most = world.tensor_map.num_experts
    return Running(
        world,
        num_slots=num_slots or rng.choice([rng.randint(1, most), most]),
        num_host_slots=num_host_slots or rng.choice([rng.randint(1, most), most]),
        way=way,
        policy=rng.choice([LRUPolicy, LFUPolicy]),
        maths=world.grouped_maths() if is_grouped else world.torch_maths(),
    )


def run_schedule(running: Running, num_forwards: int = NUM_FORWARDS, max_tokens: int = 12) -> None:
    """Forwards, prefetches and changes of stream at random; every output is checked in the end."""
    rng, world = running.world.rng, running.world
    queued: list[Forward] = []
    for _ in range(num_forwards):
        if rng.random() < 0.3:
            running.read_ahead([world.random_key() for _ in range(rng.randint(1, 4))])
        running.streams.compute_name = rng.choice(["compute", "compute", "another thread's"])
        forward = world.forward(max_tokens)
        running.run(forward)
        queued.append(forward)
        if rng.random() < 0.3:
            running.check(forward)
    for forward in queued:
        running.check(forward)


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32), way=st.sampled_from(MissWay))
def test_any_order_of_streams_and_disk(seed: int, way: MissWay) -> None:
    """Law: no order of copies, kernels and reads changes an output, whichever way misses go."""
    running = random_running(seed, way)
    run_schedule(running)
    running.engine.close()
    assert running.machine.is_idle


@needs_interpreter
@settings(max_examples=4)  # Triton's interpreter takes tenths of a second a layer
@given(seed=st.integers(0, 2**32), way=st.sampled_from(MissWay))
def test_any_order_with_grouped_products(seed: int, way: MissWay) -> None:
    """Law: the same where Triton computes experts out of the slots, together or as they come."""
    running = random_running(seed, way, is_grouped=True)
    run_schedule(running, num_forwards=4, max_tokens=3)
    running.engine.close()
    assert running.machine.is_idle


@pytest.mark.parametrize("form", STORED_WORLDS)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), way=st.sampled_from(MissWay))
def test_any_order_with_stored_experts(form: str, seed: int, way: MissWay) -> None:
    """Law: the same where slots hold experts quantised, or the link carries them packed."""
    running = random_running(seed, way, worlds=STORED_WORLDS[form])
    run_schedule(running)
    counts, world = running.engine.counts, running.world
    stored_bytes = max(map(len, world.blobs.values()))
    assert counts.copied_bytes <= stored_bytes * (counts.num_copied + counts.num_prefetched)
    running.engine.close()
    assert running.machine.is_idle


@needs_interpreter
@pytest.mark.parametrize("form", ["fp8", "mxfp4"])
def test_products_of_stored_experts(form: str) -> None:
    """Law: Triton computes from quantised slots, in any order."""
    running = random_running(1, MissWay.COPY, 3, 3, is_grouped=True, worlds=STORED_WORLDS[form])
    run_schedule(running, num_forwards=2, max_tokens=2)
    running.engine.close()
    assert running.machine.is_idle


@settings(max_examples=120)
@given(seed=st.integers(0, 2**32), way=st.sampled_from(MissWay))
def test_errors_and_interrupts_leave_nothing_in_flight(seed: int, way: MissWay) -> None:
    """Law: after a failed read or a Ctrl-C at any call nothing is under way; then all is right."""
    running = random_running(seed, way)
    rng, world = running.world.rng, running.world
    for _ in range(NUM_FORWARDS):
        trouble = rng.choice(["read", "interrupt", "prefetch", None])
        running.source.fail_probability = 0.3 if trouble == "read" else 0.0
        if trouble in ("interrupt", "prefetch"):
            running.machine.calls_left = rng.randrange(60)
        forward = world.forward()
        try:
            if trouble == "prefetch":
                running.read_ahead([world.random_key() for _ in range(4)])
            running.run(forward)
        except ExpertReadError:
            assert trouble == "read"
            assert running.machine.is_idle
        except KeyboardInterrupt:
            assert trouble in ("interrupt", "prefetch")
        else:
            running.machine.calls_left = None
            running.source.fail_probability = 0.0
            running.check(forward)
        running.machine.calls_left = None
        running.source.fail_probability = 0.0
        forward = world.forward()
        running.run(forward)
        running.check(forward)
    running.engine.close()
    assert running.machine.is_idle
    assert running.source.is_closed


def test_outputs_of_the_cpu_leave_before_the_next_layer_writes_there() -> None:
    """Law: a layer on another stream does not overwrite what the CPU computed for the last one."""
    for seed in range(12):
        running = random_running(seed, MissWay.CPU, num_slots=99, num_host_slots=99)
        running.machine.starved = "compute"
        forwards = [running.world.forward() for _ in range(2)]
        for forward, name in zip(forwards, ("compute", "another thread's"), strict=True):
            running.streams.compute_name = name
            running.run(forward)
        for forward in forwards:
            running.check(forward)
        running.engine.close()


MUTANTS = {
    "copies do not wait for kernels": (
        DeviceSlots,
        "fill",
        lambda real: (
            lambda self, slot, blob, layout, stream, *, used, poison: real(
                self, slot, blob, layout, stream, used=None, poison=poison
            )
        ),
    ),
    "kernels do not wait for copies": (
        DeviceSlots,
        "await_arrival",
        lambda real: lambda self, slot, stream: None,
    ),
    "reads do not wait for copies": (
        PinnedSlots,
        "is_free",
        lambda real: lambda self, slot: True,
    ),
    "copies do not wait for reads": (
        TieredEngine,
        "finish_read",
        lambda real: lambda self, key, slot, *, may_wait: True,
    ),
    "threads overtake each other": (
        TieredEngine,
        "mark_used",
        lambda real: lambda self, layer, compute: None,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_schedules_would_find_a_race(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: with any one of the waits taken out, a schedule soon gives a wrong output."""
    owner, method, broken = MUTANTS[name]
    monkeypatch.setattr(owner, method, broken(getattr(owner, method)))
    rng = random.Random(1)
    for seed in range(100):
        running = random_running(
            seed, MissWay.COPY, num_slots=rng.randint(1, 6), num_host_slots=rng.randint(1, 6)
        )
        try:
            run_schedule(running)
        except AssertionError:
            return
    pytest.fail(f"nobody noticed that {name}")


class AtOnce:
    """A stream that waits for nothing."""

    def launch(self, kernel: Callable[[], object]) -> None:
        kernel()


def test_the_schedules_would_find_an_expert_that_is_dequantised_too_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: where the room is filled before the stream comes to it, an output is soon wrong."""
    real = DeviceRoom.expand
    monkeypatch.setattr(
        DeviceRoom,
        "expand",
        lambda self, slot, blob, layout, stream: real(self, slot, blob, layout, AtOnce()),
    )
    for seed in range(100):
        running = random_running(seed, MissWay.COPY, 2, 2, worlds=STORED_WORLDS["fp8"])
        try:
            run_schedule(running)
        except AssertionError:
            return
    pytest.fail("nobody noticed")


@pytest.mark.parametrize("way", MissWay)
def test_one_sync_a_layer(way: MissWay) -> None:
    """Law: the host waits for the device once a layer at most, to learn the routing."""
    for seed in range(30):
        most = WORLDS[seed % len(WORLDS)].tensor_map.num_experts
        for num_slots in (max(6, most - 1), most):
            running = random_running(seed, way, num_slots, most)
            for _ in range(NUM_FORWARDS):
                running.run(running.world.forward())
            counts = running.engine.counts
            assert running.machine.num_waits == counts.num_syncs <= counts.num_layers
            running.engine.close()


@needs_interpreter
def test_no_sync_where_the_device_holds_all() -> None:
    """Law: grouped products find resident experts by a table, and the host never waits."""
    for seed in range(2):
        most = WORLDS[seed].tensor_map.num_experts
        running = random_running(seed, MissWay.AUTO, most, most, is_grouped=True)
        running.engine.fill()
        assert running.machine.num_waits == 0
        forwards = [running.world.forward(max_tokens=3) for _ in range(3)]
        for forward in forwards:
            running.run(forward)
        assert running.machine.num_waits == running.engine.counts.num_syncs == 0
        for forward in forwards:
            running.check(forward)
        running.engine.close()


@needs_interpreter
def test_grouped_bits_do_not_depend_on_what_was_cached() -> None:
    """Law: an output has the same bits whether its experts were resident or arrived one by one."""
    for seed in range(2):
        most = WORLDS[seed].tensor_map.num_experts
        resident = random_running(seed, MissWay.COPY, most, most, is_grouped=True)
        resident.engine.fill()
        forwards = [resident.world.forward(max_tokens=3) for _ in range(2)]
        for forward in forwards:
            resident.run(forward)
        resident.streams.synchronize()
        expected = [forward.found_TD for forward in forwards]
        resident.engine.close()
        for num_slots in (1, most - 1):
            running = random_running(seed, MissWay.COPY, num_slots, 2, is_grouped=True)
            for forward in forwards:
                running.run(forward)
            running.streams.synchronize()
            for forward, bits in zip(forwards, expected, strict=True):
                assert forward.found_TD is not None
                assert bits is not None
                assert torch.equal(forward.found_TD, bits)
            running.engine.close()


def test_decisions_do_not_depend_on_time() -> None:
    """Law: with one routing, caches hold the same and count the same in any order of streams."""
    seen = set()
    for number in range(8):
        running = random_running(3, MissWay.COPY, num_slots=9, num_host_slots=12)
        forwards = [running.world.forward() for _ in range(60)]
        running.machine.rng = random.Random(number)
        for forward in forwards:
            running.run(forward)
        engine = running.engine
        engine.read_use_log()
        seen.add(
            (
                tuple(sorted((key, engine.cache.slot(key)) for key in engine.cache.resident())),
                tuple(
                    (layer, c.hits, c.misses) for layer, c in sorted(engine.cache.counts.items())
                ),
                tuple(sorted(engine.host_cache.resident())),
                engine.counts.copied_bytes,
            )
        )
        engine.close()
    assert len(seen) == 1


def test_cpu_experts_travel_when_they_are_wanted_again() -> None:
    """Law: with miss='cpu' free slots fill behind the layer's back, so later layers hit."""
    world = WORLDS[0]
    running = random_running(
        0, MissWay.CPU, num_slots=world.tensor_map.num_experts, num_host_slots=99
    )
    for _ in range(40):
        forward = world.forward()
        running.run(forward)
        running.check(forward)
    counts = running.engine.counts
    assert counts.num_copied == 0
    assert 0 < counts.num_computed == counts.num_prefetched <= world.tensor_map.num_experts
    running.engine.close()


def copied(views: Weights) -> Weights:
    """What `views` show now."""
    return {name: view.clone() for name, view in views.items()}


def test_eager_use_in_waves() -> None:
    """Law: `weights` and `release` in ascending order serve any number of slots."""
    for seed in range(40):
        running = random_running(seed, MissWay.COPY, num_slots=1 + seed % 3, num_host_slots=1)
        world, layer = running.world, seed % 3
        num_experts = len(world.weights[layer])
        found: dict[int, Weights] = {}
        with running.engine.open_layer(layer, range(num_experts)) as access:
            for expert in range(num_experts):
                views = access.weights(expert)
                access.compute.launch(lambda f=found, e=expert, v=views: f.update({e: copied(v)}))
                access.release(expert)
        running.streams.synchronize()
        for expert, weights in enumerate(world.weights[layer]):
            assert all(torch.equal(found[expert][name], w) for name, w in weights.items())
        running.engine.close()


def test_unused_experts_do_no_harm() -> None:
    """Law: experts that a layer asked for and never used do not reach another's slot."""
    for seed in range(60):
        running = random_running(seed, MissWay.COPY)
        world = running.world
        for _ in range(6):
            layer = world.rng.randrange(3)
            experts = range(len(world.weights[layer]))
            with running.engine.open_layer(layer, experts) as access:
                access.weights(0)
                access.release(0)
            forward = world.forward()
            running.run(forward)
            running.check(forward)
        running.engine.close()


def test_close_ends_everything() -> None:
    """Law: after close() nothing is pinned, and a layer raises with the remedy."""
    running = random_running(5, MissWay.COPY)
    running.run(running.world.forward())
    running.read_ahead([ExpertKey(0, 0), ExpertKey(1, 1)])
    running.engine.close()
    running.engine.close()
    assert running.machine.is_idle
    assert running.streams.num_pinned == 0
    with pytest.raises(OffloadedExpertsError, match=r"released by close\(\); load the model"):
        running.engine.open_layer(0, [0])


def test_the_fake_respects_streams_and_events() -> None:
    """Law: the fake runs a stream in order and nothing before an event that it waits for."""
    orders = set()
    for seed in range(500):
        machine = FakeMachine(random.Random(seed))
        first, second = FakeStream(machine, "first"), FakeStream(machine, "second")
        done: list[str] = []
        first.launch(lambda done=done: done.append("a"))
        event = first.record()
        first.launch(lambda done=done: done.append("b"))
        second.launch(lambda done=done: done.append("c"))
        second.wait_event(event)
        second.launch(lambda done=done: done.append("d"))
        first.synchronize()
        second.synchronize()
        assert done.index("a") < min(done.index("b"), done.index("d"))
        assert done.index("c") < done.index("d")
        orders.add("".join(done))
    assert orders == {"abcd", "acbd", "acdb", "cabd", "cadb"}
