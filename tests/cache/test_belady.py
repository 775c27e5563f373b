"""Laws of Belady's policy: it evicts by the true future, and nobody misses less."""

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.belady import BeladyPolicy
from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.partitioned import PartitionedPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.queue_belady import QueueBeladyPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.expert import ExpertKey

NUM_LAYERS, NUM_EXPERTS = 3, 6
NEVER = 10**6  # more touches than any trace here has
ALL_KEYS = [ExpertKey(layer, e) for layer in range(NUM_LAYERS) for e in range(NUM_EXPERTS)]
OTHERS = {
    "lru": LRUPolicy,
    "lfu": LFUPolicy,
    "static": lambda: StaticPolicy(ALL_KEYS[::2]),
    "static, other favourites": lambda: StaticPolicy(ALL_KEYS[7:12]),
    "adapmoe": lambda: PartitionedPolicy([5, 0, 2]),
    "plec": lambda: PLECPolicy(NUM_LAYERS, NUM_EXPERTS),
    "queue_belady": lambda: QueueBeladyPolicy([ALL_KEYS[:9], ALL_KEYS[5:]] * 9, 2),
}

Visit = list[ExpertKey]  # what one step needs in one layer, ascending


def visits(num_layers: int, num_experts: int, max_size: int) -> st.SearchStrategy[list[Visit]]:
    """Any mix of single tokens, batches and prompts, which need up to all experts of a layer."""
    visit = st.tuples(
        st.integers(0, num_layers - 1),
        st.sets(st.integers(0, num_experts - 1), min_size=1, max_size=num_experts).map(sorted),
    )
    keys = visit.map(lambda found: [ExpertKey(found[0], expert) for expert in found[1]])
    return st.lists(keys, min_size=1, max_size=max_size)


def next_uses(trace: Sequence[Visit]) -> list[int]:
    """By the definition: search all that follows."""
    keys = [key for visit in trace for key in visit]
    return [
        next((later for later in range(now + 1, len(keys)) if keys[later] == key), NEVER + now)
        for now, key in enumerate(keys)
    ]


def misses(policy: EvictionPolicy, num_slots: int, trace: Sequence[Visit]) -> int:
    cache = ExpertCache(num_slots, policy)
    for visit in trace:
        cache.decide(visit)
    return sum(counts.misses for counts in cache.counts.values())


def fewest_misses(num_slots: int, trace: Sequence[Visit]) -> int:
    """Over all ways to evict: dynamic programming over the sets that a cache can hold.

    What a visit needs stays until its end where it fits. Where it does not, any key may make room,
    also one that the visit has yet to use.
    """
    costs: dict[frozenset[ExpertKey], int] = {frozenset(): 0}
    for visit in trace:
        # A visit that fits is one request for all of its keys, another is one a key.
        requests = [visit] if len(visit) <= num_slots else [[key] for key in visit]
        for request in requests:
            needed = frozenset(request)
            after: dict[frozenset[ExpertKey], int] = {}
            for held, cost in costs.items():
                rest = held - needed
                num_kept = min(len(rest), num_slots - len(needed))
                missed = cost + len(needed - held)
                for kept in combinations(sorted(rest), num_kept):
                    state = needed | frozenset(kept)
                    after[state] = min(missed, after.get(state, missed))
            costs = after
    return min(costs.values())


@given(trace=visits(NUM_LAYERS, NUM_EXPERTS, 30), num_slots=st.integers(1, 19))
@settings(max_examples=200)
def test_no_demand_policy_beats_belady(trace: list[Visit], num_slots: int) -> None:
    """Law: single tokens, batches or waves, no policy has fewer misses on any trace."""
    bound = misses(BeladyPolicy(next_uses(trace)), num_slots, trace)
    for name, make in OTHERS.items():
        assert bound <= misses(make(), num_slots, trace), name
    assert bound >= len({key for visit in trace for key in visit})


@given(trace=visits(2, 4, 9), num_slots=st.integers(1, 6))
@settings(max_examples=400)
def test_belady_is_the_optimum(trace: list[Visit], num_slots: int) -> None:
    """Law: its misses are the fewest of all ways to evict, even of those that look ahead."""
    assert misses(BeladyPolicy(next_uses(trace)), num_slots, trace) == fewest_misses(
        num_slots, trace
    )


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(ALL_KEYS[:8]),
            st.frozensets(st.sampled_from(ALL_KEYS[:8]), max_size=6),
            st.sampled_from(["keep", "victim", "last"]),
        ),
        max_size=40,
    )
)
@settings(max_examples=300)
def test_the_victim_is_the_one_used_last_of_all(
    steps: list[tuple[ExpertKey, frozenset[ExpertKey], str]],
) -> None:
    """Law: after any history, with any pins, the victim's next use is the furthest ahead."""
    future = next_uses([[key] for key, _, _ in steps])
    policy = BeladyPolicy(future)
    resident: dict[ExpertKey, int] = {}
    for (key, pinned, eviction), next_use in zip(steps, future, strict=True):
        policy.touch(key)
        policy.advise({key: 1.0})
        resident[key] = next_use
        expected = max(resident.keys() - pinned, key=resident.__getitem__, default=None)
        assert policy.victim(pinned) == expected
        assert policy.victim(pinned) == expected, "asking must change nothing"
        gone = {"keep": None, "victim": expected, "last": key}[eviction]
        if gone is not None:
            policy.forget(gone)
            del resident[gone]


def test_worked_example() -> None:
    """Law: with 2 slots, a b c a b misses 4 times, as a stays when c comes; LRU misses 5."""
    a, b, c = (ExpertKey(0, e) for e in range(3))
    trace = [[key] for key in (a, b, c, a, b)]
    assert misses(BeladyPolicy(next_uses(trace)), 2, trace) == 4
    assert misses(LRUPolicy(), 2, trace) == 5


def test_a_future_that_is_too_short_is_noticed() -> None:
    """Law: a touch that the future did not foresee is a mistake of the caller."""
    policy = BeladyPolicy([NEVER])
    policy.touch(ALL_KEYS[0])
    with pytest.raises(AssertionError, match="touched after the last"):
        policy.touch(ALL_KEYS[1])
