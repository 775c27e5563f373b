"""Laws of the cache: capacity, distinct slots, pinning, and waves that read each expert once."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.cache import Access, ExpertCache
from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.partitioned import PartitionedPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.queue_belady import QueueBeladyPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.expert import ExpertKey

NUM_EXPERTS = 6
FAVOURITES = [ExpertKey(0, 1), ExpertKey(1, 0), ExpertKey(2, 5), ExpertKey(0, 4)]
POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRUPolicy,
    "lfu": LFUPolicy,
    "static": lambda: StaticPolicy(FAVOURITES),
    "adapmoe": lambda: PartitionedPolicy([2, 1, 3]),
    "plec": lambda: PLECPolicy(3, NUM_EXPERTS),
    "queue_belady": lambda: QueueBeladyPolicy([FAVOURITES, FAVOURITES[:2]] * 4, 3),
}

Forward = tuple[int, list[int]]  # layer, experts in ascending order
forwards = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=NUM_EXPERTS).map(sorted),
    ),
    min_size=1,
    max_size=25,
)
policies = st.sampled_from(sorted(POLICIES))


def keys_of(forward: Forward) -> list[ExpertKey]:
    return [ExpertKey(forward[0], expert) for expert in forward[1]]


def contents(cache: ExpertCache) -> dict[int, ExpertKey]:
    """Slot -> key; asserts that no slot is given twice."""
    all_keys = [ExpertKey(layer, e) for layer in range(3) for e in range(NUM_EXPERTS)]
    found = [(cache.slot(key), key) for key in all_keys if key in cache]
    assert len({slot for slot, _ in found}) == len(found) == len(cache)
    return dict(found)


@given(num_slots=st.integers(1, 20), policy=policies, trace=forwards)
@settings(max_examples=300)
def test_capacity_and_distinct_slots(num_slots: int, policy: str, trace: list[Forward]) -> None:
    """Law: never more keys than slots, no slot twice, and each access says what really happened."""
    cache = ExpertCache(num_slots, POLICIES[policy]())
    num_hits = num_misses = 0
    for forward in trace:
        before = contents(cache)
        held = dict(before)
        accesses = cache.admit(keys_of(forward))
        assert [access.key for access in accesses] == keys_of(forward)
        for access in accesses:  # replay on the slots of before
            assert 0 <= access.slot < num_slots
            assert (held.get(access.slot) == access.key) == access.is_hit
            assert access.evicted == (None if access.is_hit else held.get(access.slot))
            held[access.slot] = access.key
            num_hits, num_misses = num_hits + access.is_hit, num_misses + (not access.is_hit)
        assert contents(cache) == held
        assert len(cache) <= num_slots
    assert sum(c.hits for c in cache.counts.values()) == num_hits
    assert sum(c.misses for c in cache.counts.values()) == num_misses


@given(num_slots=st.integers(NUM_EXPERTS, 12), policy=policies, trace=forwards)
@settings(max_examples=200)
def test_a_layer_that_fits_is_pinned(num_slots: int, policy: str, trace: list[Forward]) -> None:
    """Law: while what a layer needs fits, none of it is evicted, and it is all there at the end."""
    cache = ExpertCache(num_slots, POLICIES[policy]())
    for forward in trace:
        needed = set(keys_of(forward))
        resident = needed & set(contents(cache).values())
        accesses = cache.admit(keys_of(forward))
        assert {a.key for a in accesses if a.is_hit} == resident
        assert not needed & {a.evicted for a in accesses}
        assert needed <= set(contents(cache).values())


@given(num_slots=st.integers(1, NUM_EXPERTS - 1), policy=policies, trace=forwards)
@settings(max_examples=300)
def test_waves_read_each_expert_at_most_once(
    num_slots: int, policy: str, trace: list[Forward]
) -> None:
    """Law: in a layer with more experts than slots every expert is read at most once.

    One that was there is read again only if experts not yet used filled every slot and it was the
    one of them used last.
    """
    cache = ExpertCache(num_slots, POLICIES[policy]())
    for forward in trace:
        keys = keys_of(forward)
        resident = set(contents(cache).values())
        for position, access in enumerate(cache.admit(keys)):
            upcoming = [key for key in keys[position + 1 :] if key in resident]
            assert access.is_hit == (access.key in resident)
            if access.evicted in upcoming:
                assert len(upcoming) == num_slots
                assert access.evicted == upcoming[-1]
            resident = resident - {access.evicted} | {access.key}


def test_waves_worked_example() -> None:
    """Law: with 2 slots, 4 experts and the last one resident, three are read and one is hit."""
    cache = ExpertCache(2, LRUPolicy())
    cache.admit([ExpertKey(0, 3)])
    accesses = cache.admit([ExpertKey(0, e) for e in range(4)])
    slot = cache.slot(ExpertKey(0, 3))
    assert accesses == [
        Access(ExpertKey(0, 0), 1 - slot, False, None),
        Access(ExpertKey(0, 1), 1 - slot, False, ExpertKey(0, 0)),
        Access(ExpertKey(0, 2), 1 - slot, False, ExpertKey(0, 1)),
        Access(ExpertKey(0, 3), slot, True, None),
    ]


@given(num_slots=st.integers(1, 12), policy=policies, trace=forwards, data=st.data())
@settings(max_examples=150)
def test_discarded_keys_are_misses(
    num_slots: int, policy: str, trace: list[Forward], data: st.DataObject
) -> None:
    """Law: a discarded key is absent until it is read again, and its slot is used again."""
    cache = ExpertCache(num_slots, POLICIES[policy]())
    for forward in trace:
        discarded = data.draw(st.sets(st.sampled_from(keys_of(forward))), "discarded")
        for key in discarded:
            cache.discard(key)
            cache.discard(key)  # twice is once
            assert key not in cache
        accesses = cache.admit(keys_of(forward))
        assert not {a.key for a in accesses if a.is_hit} & discarded
        contents(cache)


@given(num_slots=st.integers(1, 12), policy=policies, trace=forwards)
@settings(max_examples=50)
def test_same_trace_same_decisions(num_slots: int, policy: str, trace: list[Forward]) -> None:
    """Law: decisions depend on the order of accesses only."""

    def run() -> list[Sequence[Access]]:
        cache = ExpertCache(num_slots, POLICIES[policy]())
        return [cache.admit(keys_of(forward)) for forward in trace]

    assert run() == run()


def test_absent_key_has_no_slot() -> None:
    """Law: asking for the slot of an absent key raises KeyError."""
    with pytest.raises(KeyError):
        ExpertCache(1, LRUPolicy()).slot(ExpertKey(0, 0))


@given(forwards=forwards, num_slots=st.integers(1, 12), name=policies, data=st.data())
def test_fetching_ahead_keeps_the_books(
    forwards: list[Forward], num_slots: int, name: str, data: st.DataObject
) -> None:
    """Law: a key fetched ahead has a slot of its own, evicts nothing pinned and is not counted."""
    cache = ExpertCache(num_slots, POLICIES[name]())
    for forward in forwards:
        cache.admit(keys_of(forward))
        key = data.draw(st.builds(ExpertKey, st.integers(0, 2), st.integers(0, NUM_EXPERTS - 1)))
        if key in cache:
            continue
        before, counted = contents(cache), repr(cache.counts)
        pinned = data.draw(st.sets(st.sampled_from(cache.resident())))
        room = cache.prefetch(key, pinned, lambda new, old: True)
        assert repr(cache.counts) == counted
        if room is None:
            assert set(before.values()) <= pinned
            assert contents(cache) == before
            continue
        slot, evicted = room
        assert before.get(slot) == evicted
        assert evicted not in pinned
        assert contents(cache) == before | {slot: key}
        assert len(cache) <= num_slots
