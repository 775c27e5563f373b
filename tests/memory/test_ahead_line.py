"""Laws of reading ahead: behind all demand, one piece at a time, and to be taken back."""

import threading
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.memory.ahead_line import AheadLine, AheadRead, read_now
from moe_runtime.memory.expert_load import ExpertLoad
from moe_runtime.memory.reader_pool import ReaderPool


class SteppedPool:
    """A pool of one thread that moves one job on when told to."""

    def __init__(self) -> None:
        self.jobs: deque[Callable[[], object]] = deque()

    def submit(self, job: Callable[[], object]) -> None:
        self.jobs.append(job)

    def step(self) -> None:
        if self.jobs:
            self.jobs.popleft()()

    def run(self) -> None:
        while self.jobs:
            self.step()


class Disk:
    """Reads of counted pieces, written down in the order in which they happen."""

    def __init__(self) -> None:
        self.pool = SteppedPool()
        self.line = AheadLine(self.pool)  # type: ignore[arg-type]
        self.log: list[str] = []

    def pieces(self, name: str, number: int) -> deque[Callable[[], None]]:
        return deque([lambda: self.log.append(name)] * number)

    def ahead(self, name: str, number: int) -> AheadRead:
        read = AheadRead(self.pieces(name, number), ExpertLoad(), None)
        self.line.append(read)
        return read

    def demand(self, name: str, number: int) -> ExpertLoad:
        load = ExpertLoad()
        read_now(self.pool, self.pieces(name, number), load, None)  # type: ignore[arg-type]
        return load


@given(
    ahead=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    steps=st.integers(0, 12),
    demanded=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_a_demand_waits_for_one_piece_at_most(
    ahead: list[int], steps: int, demanded: list[int]
) -> None:
    """Law: whatever is ahead, from a demand until it is read one piece of it is read at most."""
    disk = Disk()
    for number, pieces in enumerate(ahead):
        disk.ahead(f"ahead {number}", pieces)
    for _ in range(steps):
        disk.pool.step()
    before = len(disk.log)
    loads = [disk.demand("demand", pieces) for pieces in demanded]
    while not all(load.has_arrived for load in loads):
        disk.pool.step()
    assert sum(name != "demand" for name in disk.log[before:]) <= 1
    disk.pool.run()
    assert len(disk.log) == sum(ahead) + sum(demanded)
    assert len(disk.line) == 0


def test_the_first_in_line_is_read_first() -> None:
    """Law: what is ahead is read whole, one after the other, and wakes whoever waits."""
    disk = Disk()
    reads = [disk.ahead(name, 3) for name in "abc"]
    disk.pool.run()
    assert "".join(disk.log) == "aaabbbccc"
    assert all(read.load.has_arrived for read in reads)


def test_a_promoted_read_goes_before_what_is_demanded_later() -> None:
    """Law: the pieces that are left of a promoted read are demand."""
    disk = Disk()
    first, second = disk.ahead("a", 2), disk.ahead("b", 3)
    disk.line.promote(second)
    disk.demand("d", 2)
    disk.pool.run()
    assert "".join(disk.log) == "abbbdda"
    assert first.load.has_arrived
    assert second.load.has_arrived


def test_a_demoted_read_goes_last() -> None:
    """Law: a read that turned out wrong goes on only when all others are read."""
    disk = Disk()
    wrong = disk.ahead("w", 3)
    disk.ahead("r", 2)
    disk.pool.step()
    assert wrong.has_started
    assert wrong.share_taken == pytest.approx(1 / 3)
    disk.line.demote(wrong)
    disk.pool.run()
    assert "".join(disk.log) == "wrrww"


def test_a_cancelled_read_writes_nothing_more() -> None:
    """Law: after cancel() no piece of the read runs; the line goes on with the others."""
    disk = Disk()
    gone, kept = disk.ahead("g", 3), disk.ahead("k", 2)
    disk.pool.step()
    disk.line.cancel(gone)
    disk.line.cancel(gone)
    disk.pool.run()
    assert "".join(disk.log) == "gkk"
    assert not gone.load.is_done
    assert kept.load.has_arrived


def test_cancel_waits_for_the_piece_under_way() -> None:
    """Law: cancel() returns only when nothing is being written."""
    pool = ReaderPool(2, "ahead-line-under-test")
    line = AheadLine(pool)
    begun, go_on, written = threading.Event(), threading.Event(), threading.Event()

    def piece() -> None:
        begun.set()
        go_on.wait(5)
        written.set()

    read = AheadRead(deque([piece, piece]), ExpertLoad(), None)
    line.append(read)
    assert begun.wait(5)
    threading.Timer(0.02, go_on.set).start()
    line.cancel(read)
    assert written.is_set()
    written.clear()
    pool.shutdown()
    assert not written.is_set()


def test_what_comes_in_while_the_line_ends_is_read() -> None:
    """Law: however threads meet, no read is left in the line, and each piece runs once."""
    pool = ReaderPool(4, "ahead-line-under-test")
    line = AheadLine(pool)
    count = threading.Lock()
    num_run = 0

    def piece() -> None:
        nonlocal num_run
        with count:
            num_run += 1

    for _ in range(300):
        load = ExpertLoad()
        line.append(AheadRead(deque([piece] * 3), load, None))
        load.settle()
    pool.shutdown()
    assert num_run == 900


def test_a_failed_piece_is_carried_to_whoever_wants_the_expert() -> None:
    """Law: an error ahead of need harms nobody but the one who waits for it."""
    disk = Disk()

    def fail() -> None:
        raise OSError("the disk is gone")

    bad = AheadRead(deque([fail, fail]), ExpertLoad(), None)
    disk.line.append(bad)
    good = disk.ahead("g", 1)
    disk.pool.run()
    assert good.load.has_arrived
    assert bad.load.is_done
    with pytest.raises(OSError, match="the disk is gone"):
        bad.load.wait()


@pytest.mark.parametrize("interrupted_at", range(4))
def test_an_interrupted_promotion_is_settled(interrupted_at: int) -> None:
    """Law: a Ctrl-C while pieces are handed out leaves no waiter stuck and no write."""
    disk = Disk()
    read = disk.ahead("r", 3)
    disk.pool.jobs.clear()  # the line's own job: nobody reads yet
    calls = iter(range(9))
    real_submit = disk.pool.submit

    def submit(job: Callable[[], object]) -> None:
        if next(calls) == interrupted_at:
            raise KeyboardInterrupt
        real_submit(job)

    disk.pool.submit = submit  # type: ignore[method-assign]
    if interrupted_at < 3:
        with pytest.raises(KeyboardInterrupt):
            disk.line.promote(read)
        assert not read.load.has_arrived
    else:
        disk.line.promote(read)
    disk.pool.run()
    assert read.load.is_done
    assert len(disk.log) == (3 if interrupted_at == 3 else 0)
