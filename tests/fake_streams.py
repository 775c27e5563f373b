"""An accelerator whose work runs late, in any order that its streams and events allow.

Nothing runs when it is queued: the host's next call, or its next wait, lets a random number of
steps happen, each the head of a random stream or a read of the disk. Copies and reads happen in two
halves, so that whoever looks between them sees half an expert.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_runtime.errors import DeviceMemoryError, ExpertReadError, PinningError
from moe_runtime.expert import ExpertKey
from moe_runtime.memory.ahead_line import AheadLine, AheadRead, read_now
from moe_runtime.memory.anonymous_memory import Blob
from moe_runtime.memory.stream import Event

MAX_STEP_SECONDS = 1e-4


class FakeMachine:
    """The scheduler of streams and disk."""

    def __init__(self, rng: random.Random, *, is_eager: bool = False) -> None:
        self.rng = rng
        self.is_eager = is_eager  # everything runs as it is queued
        self.clock_seconds = 0.0
        self.num_waits = 0  # times that the host waited for the device
        self.calls_left: int | None = None  # until a KeyboardInterrupt
        self.starved: str | None = None  # a stream that gets nothing done until the host must wait
        self.queues: dict[str, deque[_Step]] = {}
        self.reads: list[Callable[[], object]] = []  # pieces that the disk may take next

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self.reads and not any(self.queues.values())

    def drift(self) -> None:
        """Time passes while the host does something."""
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.calls_left = None
                raise KeyboardInterrupt
        for _ in range(self.rng.choice([0, 0, 0, 1, 2, 6])):
            if not self.step(self.starved):
                return

    def queue(self, name: str, step: "_Step") -> None:
        """Put `step` behind the others of its stream."""
        self.drift()
        self.queues[name].append(step)
        while self.is_eager and self.step():
            pass

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """The host waits."""
        while not is_over():
            is_moving = self.step(self.starved) or self.step()
            assert is_moving, "the host waits for what never comes"

    def step(self, without: str | None = None) -> bool:
        """One random step that is allowed, of other streams than `without`; False if none is."""
        heads = [
            queue
            for name, queue in self.queues.items()
            if name != without and queue and queue[0].is_allowed()
        ]
        num_choices = len(heads) + len(self.reads)
        if not num_choices:
            return False
        self.clock_seconds += self.rng.random() * MAX_STEP_SECONDS
        chosen = self.rng.randrange(num_choices)
        if chosen < len(heads):
            heads[chosen].popleft().run()
        else:
            self.reads.pop(chosen - len(heads))()
        return True


@dataclass
class _Step:
    run: Callable[[], object]
    is_allowed: Callable[[], bool] = lambda: True


class FakeEvent:
    """Done when its stream has come to it."""

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self.time_seconds: float | None = None

    def is_done(self) -> bool:
        self._machine.drift()
        return self.time_seconds is not None

    def reach(self) -> None:
        self.time_seconds = self._machine.clock_seconds

    def wait(self) -> None:
        self._machine.drift()
        self._machine.num_waits += 1
        self._machine.run_until(lambda: self.time_seconds is not None)

    def seconds_since(self, start: Event) -> float:
        assert isinstance(start, FakeEvent)
        assert self.time_seconds is not None
        assert start.time_seconds is not None
        return self.time_seconds - start.time_seconds


class FakeStream:
    """A queue of steps."""

    def __init__(self, machine: FakeMachine, name: str) -> None:
        self._machine = machine
        self._name = name
        self._queue = machine.queues.setdefault(name, deque())

    def launch(self, kernel: Callable[[], object]) -> None:
        self._machine.queue(self._name, _Step(kernel))

    def copy_async(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        half = len(target) // 2
        for part in (slice(half), slice(half, None)):
            self.launch(lambda t=target[part], s=source[part]: t.copy_(s))  # type: ignore[misc]

    def record(self, *, is_timed: bool = False) -> FakeEvent:
        event = FakeEvent(self._machine)
        self.launch(event.reach)
        return event

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        reached = _Step(lambda: None, lambda: event.time_seconds is not None)
        self._machine.queue(self._name, reached)

    def synchronize(self) -> None:
        self._machine.run_until(lambda: not self._queue)


class FakeStreams:
    """Three streams over CPU memory. `num_bytes` is what the device has."""

    def __init__(
        self, machine: FakeMachine, *, num_bytes: int = 2**40, can_pin: bool = True
    ) -> None:
        self.machine = machine
        self.device = torch.device("cpu")
        self.demand = FakeStream(machine, "demand")
        self.prefetch = FakeStream(machine, "prefetch")
        self.compute_name = "compute"  # tests change it as threads do
        self.num_pinned = 0
        self._free_bytes = num_bytes
        self._can_pin = can_pin

    def compute(self) -> FakeStream:
        return FakeStream(self.machine, self.compute_name)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > self._free_bytes:
            raise DeviceMemoryError(num_bytes, self._free_bytes)
        return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def free_bytes(self) -> int:
        return self._free_bytes

    def pin(self, memory: torch.Tensor) -> None:
        if not self._can_pin:
            raise PinningError("the test says no")
        self.num_pinned += 1

    def unpin(self, memory: torch.Tensor) -> None:
        assert self.machine.is_idle, "unpinned while in use"
        self.num_pinned -= 1

    def synchronize(self) -> None:
        self.machine.run_until(lambda: not any(self.machine.queues.values()))


class FakePool:
    """Threads of the disk, which take pieces in any order."""

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine

    def submit(self, job: Callable[[], object]) -> None:
        self._machine.reads.append(job)


class FakeLoad:
    """One expert on its way, on which nobody blocks."""

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self._error: BaseException | None = None
        self._remaining = 0
        self._is_over = False
        self.has_begun = False

    @property
    def is_done(self) -> bool:
        self._machine.drift()
        return self._is_over

    @property
    def has_arrived(self) -> bool:
        return self._is_over and self._error is None

    def begin(self, num_reads: int) -> None:
        self._remaining, self.has_begun = num_reads, True

    def account(self, error: BaseException | None, on_complete: object) -> None:
        self._error = self._error or error
        self._remaining -= 1
        self._is_over = self._remaining == 0

    def settle(self) -> None:
        if self.has_begun:
            self._machine.run_until(lambda: self._is_over)

    def wait(self) -> None:
        assert self.has_begun
        self.settle()
        if self._error is not None:
            raise self._error


class FakeSource:
    """A disk that holds `blobs`, gives an expert in two halves, and fails now and then."""

    def __init__(self, machine: FakeMachine, blobs: Mapping[ExpertKey, Blob]) -> None:
        self.fail_probability = 0.0
        self.bytes_read = 0
        self.is_closed = False
        self._machine = machine
        self._blobs = blobs
        self._pool: Any = FakePool(machine)
        self.ahead = AheadLine(self._pool)

    def new_load(self) -> FakeLoad:
        return FakeLoad(self._machine)

    def start(self, key: ExpertKey, blob: Blob, load: Any) -> None:
        self._machine.drift()
        read_now(self._pool, self._halves(key, blob), load, None)

    def ahead_read(self, key: ExpertKey, blob: Blob, load: Any) -> AheadRead:
        self._machine.drift()
        return AheadRead(self._halves(key, blob), load, None)

    def set_watch(self, watch: object) -> None:
        """It makes no reads that take time."""

    def close(self) -> None:
        self.ahead.clear()
        self._machine.run_until(lambda: not self._machine.reads)
        self.is_closed = True

    def _halves(self, key: ExpertKey, blob: Blob) -> deque[Callable[[], None]]:
        data = self._blobs[key]
        is_bad = self._machine.rng.random() < self.fail_probability

        def write(part: slice) -> None:
            if is_bad:
                raise ExpertReadError(f"injected at {key}")
            blob[: len(data)][part] = data[part]
            self.bytes_read += len(data[part])

        half = len(data) // 2
        return deque([lambda: write(slice(half)), lambda: write(slice(half, None))])
