"""Laws of Belady's rule on predicted paths: with true paths it is Belady."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.queue_belady import QueueBeladyPolicy
from moe_runtime.expert import ExpertKey
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.replay import replay_all
from moe_runtime.trace import Trace
from tests.simulate.traces import make_trace, visits_of

num_slots = st.integers(2, 20)


def misses(policy: EvictionPolicy, slots: int, trace: Trace) -> int:
    cache = ExpertCache(slots, policy)
    for _, keys in visits_of(trace):
        cache.decide(keys)
    return sum(counts.misses for counts in cache.counts.values())


def paths_of(trace: Trace) -> list[list[ExpertKey]]:
    found: dict[int, list[ExpertKey]] = {}
    for step, keys in visits_of(trace):
        found.setdefault(step, []).extend(keys)
    return list(found.values())


@given(seed=st.integers(0, 1000), slots=num_slots)
@settings(max_examples=100)
def test_with_true_paths_it_misses_as_belady(seed: int, slots: int) -> None:
    """Law: a queue that is known to its end and comes true is Belady's future."""
    trace = make_trace(seed, num_tokens=25)
    accesses = Accesses.of(trace)
    found, belady = replay_all(
        accesses, slots=[slots], policies=["queue_belady", "belady"], queue=accesses
    )
    assert found.misses == belady.misses
    assert not found.sees_future


@given(seed=st.integers(0, 1000), slots=num_slots)
@settings(max_examples=50)
def test_without_a_queue_it_is_lru(seed: int, slots: int) -> None:
    """Law: where nothing is expected, the longest unused leaves."""
    trace = make_trace(seed, num_tokens=25)
    assert misses(QueueBeladyPolicy([], 5), slots, trace) == misses(LRUPolicy(), slots, trace)


def test_what_is_beyond_the_queue_is_not_known() -> None:
    """Law: with one step queued, a use two steps ahead counts as none."""
    a, b, c = (ExpertKey(0, e) for e in range(3))
    near = QueueBeladyPolicy([[a], [b], [c], [b], [a]], 1)
    far = QueueBeladyPolicy([[a], [b], [c], [b], [a]], 4)
    for policy in (near, far):
        for key in (a, b, c):
            policy.visit([key])
            policy.touch(key)
    # After c both b, in the next step, and a, in the one after, are known to `far` only.
    assert far.victim({c}) == a
    assert near.victim({c}) == a
    far.touch(a)
    near.forget(b)
    near.touch(b)
    assert near.victim({c}) == a, "b is expected next step, a not at all"


@given(seed=st.integers(0, 1000), slots=num_slots)
@settings(max_examples=50)
def test_wrong_paths_never_beat_belady(seed: int, slots: int) -> None:
    """Law: whatever is predicted, Belady is the bound."""
    trace, other = make_trace(seed, num_tokens=25), make_trace(seed + 1, num_tokens=25)
    (belady,) = replay_all(Accesses.of(trace), slots=[slots], policies=["belady"])
    assert misses(QueueBeladyPolicy(paths_of(other), 25), slots, trace) >= belady.misses
