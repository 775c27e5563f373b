"""Laws of eviction policies: each evicts what its slow and obvious definition says."""

from collections.abc import Set

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.expert import ExpertKey

KEYS = [ExpertKey(layer, expert) for layer in range(2) for expert in range(4)]
FAVOURITES = [KEYS[5], KEYS[0], KEYS[3]]


class History:
    """Remembers every touch and who is resident; answers by searching all of it."""

    def __init__(self) -> None:
        self.touches: list[ExpertKey] = []
        self.resident: set[ExpertKey] = set()

    def last_use(self, key: ExpertKey) -> int:
        return max(time for time, touched in enumerate(self.touches) if touched == key)

    def lru(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        return min(self.resident - pinned, key=self.last_use, default=None)

    def lfu(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        return min(
            self.resident - pinned,
            key=lambda key: (self.touches.count(key), self.last_use(key)),
            default=None,
        )

    def static(self, pinned: Set[ExpertKey]) -> ExpertKey | None:
        left = self.resident - pinned
        others = left - set(FAVOURITES)
        if others:
            return min(others, key=self.last_use)
        return max(left, key=FAVOURITES.index, default=None)


def make(name: str) -> EvictionPolicy:
    return {"lru": LRUPolicy, "lfu": LFUPolicy, "static": lambda: StaticPolicy(FAVOURITES)}[name]()


@pytest.mark.parametrize("name", ["lru", "lfu", "static"])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["touch", "touch", "touch", "evict", "forget", "advise"]),
            st.sampled_from(KEYS),
            st.frozensets(st.sampled_from(KEYS), max_size=6),
        ),
        max_size=60,
    )
)
@settings(max_examples=300)
def test_victims_are_those_of_the_definition(
    name: str, steps: list[tuple[str, ExpertKey, frozenset[ExpertKey]]]
) -> None:
    """Law: after any history, with any pins, the victim is the one that the definition names."""
    policy, history = make(name), History()
    for action, key, pinned in steps:
        if action == "touch":
            policy.touch(key)
            history.touches.append(key)
            history.resident.add(key)
        elif action == "advise":
            policy.advise({key: 0.5})
        else:
            victim = policy.victim(pinned)
            assert victim == policy.victim(pinned), "asking must change nothing"
            assert victim == getattr(history, name)(pinned)
            gone = victim if action == "evict" else key if key in history.resident else None
            if gone is not None:
                policy.forget(gone)
                history.resident.remove(gone)
    assert policy.victim(frozenset(KEYS)) is None


def test_lfu_counts_survive_eviction() -> None:
    """Law: an expert that returns to an LFU cache keeps the uses it had before it left."""
    policy = LFUPolicy()
    favourite, steady, newcomer = KEYS[:3]
    for _ in range(5):
        policy.touch(favourite)
    policy.forget(favourite)
    for _ in range(3):
        policy.touch(steady)
    policy.touch(favourite)
    assert policy.victim(frozenset()) == steady
    policy.touch(newcomer)
    assert policy.victim(frozenset()) == newcomer


def misses(policy: EvictionPolicy, num_slots: int, trace: list[ExpertKey]) -> int:
    cache = ExpertCache(num_slots, policy)
    for key in trace:
        cache.admit([key])
    return sum(counts.misses for counts in cache.counts.values())


def belady_misses(num_slots: int, trace: list[ExpertKey]) -> int:
    """The fewest misses any policy can have: evict what is needed furthest ahead."""
    resident: set[ExpertKey] = set()
    count = 0
    for time, key in enumerate(trace):
        if key in resident:
            continue
        count += 1
        if len(resident) == num_slots:
            ahead = trace[time + 1 :]
            resident.remove(
                max(resident, key=lambda k: ahead.index(k) if k in ahead else len(trace))
            )
        resident.add(key)
    return count


@given(
    trace=st.lists(st.sampled_from(KEYS), max_size=80),
    num_slots=st.integers(1, 8),
    name=st.sampled_from(["lru", "lfu", "static"]),
)
@settings(max_examples=150)
def test_belady_bounds_every_policy(trace: list[ExpertKey], num_slots: int, name: str) -> None:
    """Law: no policy misses less than Belady's, and none less than once per distinct key."""
    found = misses(make(name), num_slots, trace)
    assert len(set(trace)) <= belady_misses(num_slots, trace) <= found <= len(trace)


@given(trace=st.lists(st.sampled_from(KEYS), max_size=80), num_slots=st.integers(1, 7))
@settings(max_examples=100)
def test_lru_never_gains_from_less_room(trace: list[ExpertKey], num_slots: int) -> None:
    """Law: LRU is a stack algorithm: one more slot never adds a miss."""
    assert misses(LRUPolicy(), num_slots + 1, trace) <= misses(LRUPolicy(), num_slots, trace)
