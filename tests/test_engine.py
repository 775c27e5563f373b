"""Laws of the engine: any schedule of reads gives the output of whole weights, bit for bit."""

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
import torch

from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.engine import ExpertEngine, LayerAccess, Weights
from moe_runtime.errors import ExpertReadError, OffloadedExpertsError
from moe_runtime.expert import ExpertKey
from moe_runtime.layer import Dispatch, ExpertAccess, ExpertMath, run_experts
from moe_runtime.memory.ahead_line import AheadLine
from moe_runtime.memory.anonymous_memory import Blob
from moe_runtime.memory.disk import DiskReader, _OpenFile
from moe_runtime.memory.slots import HostSlots
from moe_runtime.memory.tensor_map import TensorMap
from tests.expert_files import KINDS, FileWriter, Parameter, make_layer
from tests.honest_experts import honest_forward, parameter_shapes, random_math, random_routing
from tests.interruption import NEVER, Interruption

# T tokens, K top-k, E experts, D model dim, F ffn dim

NUM_SCHEDULES = 10_000
SCHEDULES_PER_ENGINE = 25
MODEL_DIM, FFN_DIM = 16, 24
NUM_LAYERS = 2
MAX_TOKENS = 40
NUM_WORLDS = 16
MAX_NAP_SECONDS = 200e-6


@dataclass
class World:
    """Layers of experts in files, and the same weights in memory."""

    tensor_map: TensorMap
    maths: list[ExpertMath]
    weights: list[list[Weights]]  # [layer][expert], each parameter in memory of its own
    dtype: torch.dtype


def make_world(folder: Path, seed: int) -> World:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    writer = FileWriter(folder, rng, rng.randint(1, 3))
    dtype = torch.bfloat16 if seed % 4 == 3 else torch.float32
    maths, layers, weights = [], [], []
    for _ in range(NUM_LAYERS):
        math = random_math(rng)
        parameters = [
            Parameter(name, rng.choice(KINDS if len(s) == 2 else KINDS[:3]), s, dtype, dtype)
            for name, s in parameter_shapes(math, MODEL_DIM, FFN_DIM).items()
        ]
        num_experts = rng.randint(2, 8)
        layer, whole = make_layer(parameters, num_experts, writer, generator)
        maths.append(math)
        layers.append(layer)
        weights.append(
            [{name: w[e].clone() for name, w in whole.items()} for e in range(num_experts)]
        )
    writer.write(tail_bytes=rng.randrange(5000))
    return World(TensorMap(layers), maths, weights, dtype)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[World]:
    return [make_world(tmp_path_factory.mktemp("experts"), seed) for seed in range(NUM_WORLDS)]


class ShuffledPool:
    """Threads that take the waiting jobs in random order, and nap before they do."""

    def __init__(self, num_threads: int, rng: random.Random) -> None:
        self._rng = random.Random(rng.random())
        self._jobs: list[Callable[[], object]] = []
        self._changed = threading.Condition()
        self._is_shut = False
        self._threads = [threading.Thread(target=self._work) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], object]) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def shutdown(self) -> None:
        with self._changed:
            self._is_shut = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    if self._is_shut:
                        return
                    self._changed.wait()
                job = self._jobs.pop(self._rng.randrange(len(self._jobs)))
                nap = self._rng.choice([None, 0.0, self._rng.random() * MAX_NAP_SECONDS])
            if nap is not None:
                time.sleep(nap)
            job()


class RandomReader(DiskReader):
    """Reads that fail with `fail_probability`."""

    fail_probability = 0.0
    rng = random.Random(0)

    def _read(self, file: _OpenFile, offset: int, num_bytes: int, buffer: object) -> Blob:
        if self.fail_probability and self.rng.random() < self.fail_probability:
            raise ExpertReadError(f"injected failure at {offset}")
        return super()._read(file, offset, num_bytes, buffer)  # type: ignore[arg-type]


@contextmanager
def running(
    world: World, rng: random.Random, num_slots: int | None = None, shuffled: bool = True
) -> Iterator[ExpertEngine]:
    """A poisoned engine over `world` whose threads run in random order."""
    reader = RandomReader(
        world.tensor_map.files(), direct=rng.random() < 0.5, num_threads=2, chunk_bytes=8192
    )
    reader.rng = random.Random(rng.random())
    if shuffled:
        reader._pool.shutdown()
        reader._pool = ShuffledPool(rng.randint(1, 2), rng)  # type: ignore[assignment]
        reader.ahead = AheadLine(reader._pool)
    most = world.tensor_map.num_experts
    favourites = [ExpertKey(layer, 0) for layer in range(NUM_LAYERS)]
    num_slots, slot_bytes = num_slots or rng.randint(1, most), world.tensor_map.slot_bytes
    engine = ExpertEngine(
        world.tensor_map,
        HostSlots(num_slots, slot_bytes),
        rng.choice([LRUPolicy, LFUPolicy, lambda: StaticPolicy(favourites)])(),
        reader,
        poison=True,
    )
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Forward:
    """Inputs of one layer and the output that whole weights give."""

    layer: int
    hidden_TD: torch.Tensor
    dispatch: Dispatch
    expected_TD: torch.Tensor

    @classmethod
    def random(cls, world: World, rng: random.Random, generator: torch.Generator) -> "Forward":
        layer = rng.randrange(NUM_LAYERS)
        weights = world.weights[layer]
        num_tokens = rng.choice([1, 1, rng.randint(1, MAX_TOKENS)])
        hidden_TD = torch.randn(num_tokens, MODEL_DIM, generator=generator).to(world.dtype)
        index_TK, scores_TK = random_routing(rng, generator, num_tokens, len(weights))
        return cls(
            layer,
            hidden_TD,
            Dispatch.of(index_TK, scores_TK, len(weights)),
            honest_forward(world.maths[layer], weights, hidden_TD, index_TK, scores_TK),
        )

    def run(
        self,
        world: World,
        engine: ExpertEngine,
        wrap: Callable[[LayerAccess], ExpertAccess] = lambda access: access,
    ) -> torch.Tensor:
        if not self.dispatch.experts:
            return torch.zeros_like(self.hidden_TD)
        with engine.open_layer(self.layer, self.dispatch.experts) as access:
            return run_experts(world.maths[self.layer], self.hidden_TD, self.dispatch, wrap(access))

    def check(self, world: World, engine: ExpertEngine) -> None:
        assert torch.equal(self.run(world, engine), self.expected_TD)


class Interrupting:
    """Raises KeyboardInterrupt out of one of the calls."""

    def __init__(self, access: LayerAccess, rng: random.Random) -> None:
        self._access = access
        self._calls_left = rng.randrange(12)

    def __getattr__(self, name: str) -> object:
        if self._calls_left == 0:
            raise KeyboardInterrupt
        self._calls_left -= 1
        return getattr(self._access, name)


@pytest.mark.timeout(280)
def test_ten_thousand_schedules(worlds: list[World]) -> None:
    """Law: 10,000 random schedules of slots, batch, routing and thread timing, no wrong output.

    In a fifth of the engines reads fail or calls are interrupted now and then; that schedule raises
    and the next ones are right.
    """
    threads = threading.active_count()
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    num_run = num_raised = 0
    for number in range(NUM_SCHEDULES // SCHEDULES_PER_ENGINE):
        world = worlds[number % len(worlds)]
        is_troubled = number % 5 == 4
        with running(world, rng) as engine:
            for _ in range(SCHEDULES_PER_ENGINE):
                forward = Forward.random(world, rng, generator)
                num_run += 1
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
                    assert trouble is not None
                    num_raised += 1
                    continue
                assert torch.equal(found, forward.expected_TD), (number, forward.layer)
    assert num_run == NUM_SCHEDULES
    assert num_raised > 100
    assert threading.active_count() == threads


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # hit a finalizer
def test_interrupts_at_any_instruction(worlds: list[World]) -> None:
    """Law: a Ctrl-C at any moment leaves no wrong expert behind, no thread and no lock."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    threads = threading.active_count()
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    num_interrupted = 0
    try:
        for number in range(40):
            world = worlds[number % len(worlds)]
            with running(world, rng, shuffled=False) as engine:
                for _ in range(12):
                    forward = Forward.random(world, rng, generator)
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 1e-6 + 2e-3 * rng.random())
                        for _ in range(20):
                            forward.run(world, engine)
                        signal.setitimer(signal.ITIMER_REAL, 0)
                    except KeyboardInterrupt:
                        num_interrupted += 1
                    for _ in range(2):
                        Forward.random(world, rng, generator).check(world, engine)
                    forward.check(world, engine)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert num_interrupted > 100
    assert threading.active_count() == threads


INTERRUPTIBLE = [
    (ExpertEngine, "_start_load"), (ExpertEngine, "_drop_load"), (LayerAccess, "_start"),
    (LayerAccess, "_begin"), (LayerAccess, "release"), (LayerAccess, "weights"),
    (LRUPolicy, "touch"), (LRUPolicy, "victim"), (LRUPolicy, "forget"), (DiskReader, "submit"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), INTERRUPTIBLE, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupt_between_steps(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch, owner: type, name: str, when: str
) -> None:
    """Law: an interrupt before or after any step of a layer leaves the engine right."""
    rng, generator = random.Random(4), torch.Generator().manual_seed(4)
    interruption = Interruption(monkeypatch, owner, name, when)
    num_interrupted = 0
    for world in worlds[:3]:
        for num_slots in (1, 4):
            with running(world, rng, num_slots=num_slots) as engine:
                engine.cache.policy = LRUPolicy()
                for _ in range(8):
                    interruption.calls_left = rng.randint(1, 8)
                    forward = Forward.random(world, rng, generator)
                    try:
                        forward.check(world, engine)
                    except KeyboardInterrupt:
                        num_interrupted += 1
                    interruption.calls_left = NEVER
                    forward.check(world, engine)
                    Forward.random(world, rng, generator).check(world, engine)
    assert num_interrupted > 0


def test_two_engines_share_nothing(worlds: list[World]) -> None:
    """Law: two models in one process, one layer of each in turn, do not disturb each other."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    with running(worlds[0], rng) as first, running(worlds[1], rng) as second:
        for _ in range(50):
            Forward.random(worlds[0], rng, generator).check(worlds[0], first)
            Forward.random(worlds[1], rng, generator).check(worlds[1], second)


@pytest.mark.timeout(60)
def test_threads_take_turns(worlds: list[World]) -> None:
    """Law: layers run from several threads at once wait their turn and are right."""
    world, rng = worlds[2], random.Random(6)
    wrong: list[str] = []
    with running(world, rng) as engine:

        def work(seed: int) -> None:
            own, generator = random.Random(seed), torch.Generator().manual_seed(seed)
            try:
                for _ in range(40):
                    Forward.random(world, own, generator).check(world, engine)
            except BaseException as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_unused_experts_do_no_harm(worlds: list[World]) -> None:
    """Law: reads that a layer asked for and did not wait for never reach another expert's slot."""
    rng, generator = random.Random(12), torch.Generator().manual_seed(12)
    for number in range(60):
        world = worlds[number % len(worlds)]
        with running(world, rng, num_slots=max(map(len, world.weights))) as engine:
            for _ in range(6):
                layer = rng.randrange(NUM_LAYERS)
                with engine.open_layer(layer, range(len(world.weights[layer]))) as access:
                    access.weights(0)
                Forward.random(world, rng, generator).check(world, engine)


def test_close_ends_everything(worlds: list[World]) -> None:
    """Law: after close() a layer raises with the remedy, and closing again does nothing."""
    rng, generator = random.Random(7), torch.Generator().manual_seed(7)
    threads = threading.active_count()
    with running(worlds[0], rng) as engine:
        Forward.random(worlds[0], rng, generator).check(worlds[0], engine)
        engine.close()
        engine.close()
        assert threading.active_count() == threads
        with pytest.raises(OffloadedExpertsError, match=r"released by close\(\); load the model"):
            engine.open_layer(0, [0])


def test_close_waits_for_the_layer(worlds: list[World]) -> None:
    """Law: close() from another thread waits until the layer that runs is done."""
    rng, generator = random.Random(8), torch.Generator().manual_seed(8)
    world = worlds[0]
    forward = Forward.random(world, rng, generator)
    with running(world, rng) as engine:
        closing = threading.Thread(target=engine.close)

        def start_closing(access: LayerAccess) -> ExpertAccess:
            closing.start()
            time.sleep(0.01)
            return access

        found = forward.run(world, engine, start_closing)
        closing.join()
    assert torch.equal(found, forward.expected_TD)


def test_failed_read_raises_and_recovers(worlds: list[World]) -> None:
    """Law: a failed read raises out of the layer that needed it; the next try reads it again."""
    rng, generator = random.Random(9), torch.Generator().manual_seed(9)
    world = worlds[0]
    forward = Forward.random(world, rng, generator)
    with running(world, rng) as engine:
        assert isinstance(engine.reader, RandomReader)
        engine.reader.fail_probability = 1.0
        for _ in range(3):
            with pytest.raises(ExpertReadError, match="injected failure"):
                forward.check(world, engine)
        engine.reader.fail_probability = 0.0
        forward.check(world, engine)


def test_hits_read_nothing(worlds: list[World]) -> None:
    """Law: an expert in a slot is not read again; one read serves each miss."""
    rng, generator = random.Random(10), torch.Generator().manual_seed(10)
    world = worlds[0]
    with running(world, rng, num_slots=world.tensor_map.num_experts) as engine:
        for _ in range(60):
            Forward.random(world, rng, generator).check(world, engine)
        misses = sum(counts.misses for counts in engine.cache.counts.values())
        assert misses == len(engine.cache) <= world.tensor_map.num_experts
        before = engine.reader.bytes_read
        for layer in range(NUM_LAYERS):
            resident = [
                e for e in range(len(world.weights[layer])) if ExpertKey(layer, e) in engine.cache
            ]
            with engine.open_layer(layer, resident) as access:
                for expert in resident:
                    assert access.is_ready(expert)
                    for name, value in access.weights(expert).items():
                        assert torch.equal(value, world.weights[layer][expert][name])
                    access.release(expert)
        assert engine.reader.bytes_read == before


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_waves_read_each_expert_once(worlds: list[World], num_slots: int) -> None:
    """Law: a layer that needs more experts than there are slots reads each one once."""
    rng, generator = random.Random(11), torch.Generator().manual_seed(11)
    for world in worlds[:4]:
        num_experts = len(world.weights[0])
        index_TK = torch.rand(9, num_experts, generator=generator).argsort(-1)
        scores_TK = torch.rand(9, num_experts, generator=generator)
        hidden_TD = torch.randn(9, MODEL_DIM, generator=generator).to(world.dtype)
        forward = Forward(
            0,
            hidden_TD,
            Dispatch.of(index_TK, scores_TK, num_experts),
            honest_forward(world.maths[0], world.weights[0], hidden_TD, index_TK, scores_TK),
        )
        with running(world, rng, num_slots=num_slots) as engine:
            forward.check(world, engine)
            counts = engine.cache.counts[0]
            assert (counts.hits, counts.misses) == (0, num_experts)
            forward.check(world, engine)
            assert counts.misses <= 2 * num_experts


def test_poison_is_nan() -> None:
    """Law: a poisoned slot is NaN in every dtype, so that a race cannot hide."""
    slots = HostSlots(2, 64)
    slots.blob(0).fill(0)
    slots.poison(1)
    memory = torch.from_numpy(slots.blob(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert memory.view(dtype).isnan().all()
    assert not slots.blob(0).any()


def test_slots_start_on_cache_lines(worlds: list[World]) -> None:
    """Law: every parameter in every slot starts on a cache line, as torch's own memory does."""
    for world in worlds[:4]:
        slots = HostSlots(3, world.tensor_map.slot_bytes)
        for slot, layer in itertools.product(range(3), range(NUM_LAYERS)):
            layout = world.tensor_map.layout(ExpertKey(layer, 0))
            assert all(t.data_ptr() % 64 == 0 for t in slots.views(slot, layout).values())
