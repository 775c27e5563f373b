"""Laws of parting slots among layers: the optimum, and a policy that keeps to its shares."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.allocation import allocate
from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.partitioned import PartitionedPolicy
from moe_runtime.expert import ExpertKey
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.policy_maker import expected_misses
from moe_runtime.simulate.replay import replay
from moe_runtime.trace import Trace
from tests.simulate.traces import make_trace

costs = st.lists(
    st.lists(st.integers(0, 50).map(float), min_size=2, max_size=5), min_size=1, max_size=4
)


@given(expected=costs, num_slots=st.integers(0, 16))
@settings(max_examples=300)
def test_the_programme_finds_the_optimum(expected: list[list[float]], num_slots: int) -> None:
    """Law: of all ways to part the slots none is expected to miss less, by trying each."""
    shares = allocate(expected, num_slots)
    least = 1 if num_slots >= len(expected) else 0
    assert all(least <= share < len(misses) for share, misses in zip(shares, expected, strict=True))
    assert sum(shares) <= num_slots
    ways = product(*(range(least, len(misses)) for misses in expected))
    best = min(
        sum(misses[k] for misses, k in zip(expected, way, strict=True))
        for way in ways
        if sum(way) <= num_slots
    )
    assert sum(misses[k] for misses, k in zip(expected, shares, strict=True)) == best


@given(seed=st.integers(0, 1000), share=st.integers(2, 8))
@settings(max_examples=50)
def test_expected_misses_are_those_of_lru_alone(seed: int, share: int) -> None:
    """Law: with k slots of its own a layer misses what LRU with k slots misses on it."""
    trace = make_trace(seed, num_tokens=30, num_layers=1)
    accesses = Accesses.of(trace)
    ((*misses,),) = expected_misses(accesses)
    singly = Trace.of({"topk": accesses.expert[:, None, None]}, num_experts=trace.num_experts)
    assert misses[share] == replay(Accesses.of(singly), LRUPolicy(), share).misses


@given(seed=st.integers(0, 1000), shares=st.tuples(*[st.integers(2, 6)] * 3))
@settings(max_examples=100)
def test_who_leaves_is_of_a_layer_above_its_share(seed: int, shares: tuple[int, ...]) -> None:
    """Law: a layer within its share loses nobody, unless all above theirs are pinned."""
    cache = ExpertCache(sum(shares), PartitionedPolicy(shares))
    for keys in Accesses.of(make_trace(seed, num_tokens=30)).visits():
        before = [[ExpertKey(n, e) for e in range(8) if ExpertKey(n, e) in cache] for n in range(3)]
        gone = [access.evicted for access in cache.admit(keys) if access.evicted is not None]
        visited = keys[0].layer
        above = [
            key
            for layer, held in enumerate(before)
            for key in held
            if len(held) + len(keys) * (layer == visited) > shares[layer] and key not in keys
        ]
        assert set(gone) <= set(above) or len(above) < len(gone)


@given(seed=st.integers(0, 1000), slots=st.integers(2, 9))
@settings(max_examples=50)
def test_one_layer_alone_is_lru(seed: int, slots: int) -> None:
    """Law: a single layer with all slots evicts as LRU does."""
    accesses = Accesses.of(make_trace(seed, num_tokens=30, num_layers=1))
    found = replay(accesses, PartitionedPolicy([slots]), slots)
    assert found.misses == replay(accesses, LRUPolicy(), slots).misses
