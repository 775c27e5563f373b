"""Laws of a cache that an interrupt hit in the middle of a decision: cleared, it works as new."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.partitioned import PartitionedPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.queue_belady import QueueBeladyPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.expert import ExpertKey

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(5)]
POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRUPolicy,
    "lfu": LFUPolicy,
    "static": lambda: StaticPolicy(KEYS[::2]),
    "adapmoe": lambda: PartitionedPolicy([1, 3]),
    "plec": lambda: PLECPolicy(2, 5),
    "queue_belady": lambda: QueueBeladyPolicy([KEYS[:7], KEYS[3:]] * 3, 2),
}
VISITS = [KEYS[:3], KEYS[5:7], KEYS[1:4], KEYS[:5], KEYS[6:9], KEYS[2:5]]
NUM_SLOTS = 4


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


def interrupted_after(num_lines: int, work: Callable[[], object]) -> bool:
    """Raise in `work` before it runs the given line of the cache room; whether it got there."""
    left = num_lines

    def on_event(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if "/cache/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupt
        return on_event

    before = sys.gettrace()
    sys.settrace(on_event)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("name", POLICIES)
def test_a_cleared_cache_works_whatever_line_was_interrupted(name: str) -> None:
    """Law: after `clear` nothing is resident, capacity holds, and each key is given a slot."""
    num_lines = 0
    was_interrupted = True
    while was_interrupted:
        num_lines += 1
        cache = ExpertCache(NUM_SLOTS, POLICIES[name]())

        def work(cache: ExpertCache = cache) -> None:
            for visit in VISITS:
                cache.decide(visit)

        was_interrupted = interrupted_after(num_lines, work)
        cache.clear()
        assert not any(key in cache for key in KEYS)
        for visit in VISITS:
            for access in cache.admit(visit):
                assert 0 <= access.slot < NUM_SLOTS
            assert len(cache) <= NUM_SLOTS
            held = [cache.slot(key) for key in KEYS if key in cache]
            assert len(set(held)) == len(held) == len(cache)
    assert num_lines > len(VISITS)
