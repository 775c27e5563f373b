"""Laws of the replay: the real cache's decisions, no look into the future, and Belady's bound."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.allocation import allocate
from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lfu import LFUPolicy
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.partitioned import PartitionedPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.static import StaticPolicy
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.simulate.policy_maker import POLICIES, expected_misses
from moe_runtime.simulate.replay import gap_closed, replay_all, simulate
from moe_runtime.trace import Trace
from moe_runtime.trace_fields import Array
from tests.simulate.traces import make_trace, traces, visits_of

GPT_OSS = Path(__file__).resolve().parents[3] / "shared" / "traces" / "gptoss20b.npz"
CAUSAL = ("lru", "lfu", "static", "adapmoe", "plec")


def fresh_policy(name: str, trace: Trace, slots: int) -> EvictionPolicy:
    uses = Counter(key for _, keys in visits_of(trace) for key in keys)
    favourites = sorted(uses, key=lambda key: (-uses[key], key))[:slots]
    make: dict[str, Callable[[], EvictionPolicy]] = {
        "lru": LRUPolicy,
        "lfu": LFUPolicy,
        "static": lambda: StaticPolicy(favourites),
        "adapmoe": lambda: PartitionedPolicy(allocate(expected_misses(Accesses.of(trace)), slots)),
        "plec": lambda: PLECPolicy(trace.num_layers, trace.num_experts),
    }
    return make[name]()


@given(trace=traces, slots=st.integers(1, 20), policy=st.sampled_from(CAUSAL))
@settings(max_examples=200)
def test_counts_are_those_of_the_cache(trace: Trace, slots: int, policy: str) -> None:
    """Law: layer by layer, hits and misses are what `ExpertCache.admit` counts."""
    cache = ExpertCache(slots, fresh_policy(policy, trace, slots))
    is_hit = [access.is_hit for _, keys in visits_of(trace) for access in cache.admit(keys)]
    (found,) = replay_all(Accesses.of(trace), slots=[slots], policies=[policy], keep_hits=True)
    layers = range(trace.num_layers)
    assert found.layer_hits == tuple(cache.counts[layer].hits for layer in layers)
    assert found.layer_misses == tuple(cache.counts[layer].misses for layer in layers)
    assert found.is_hit is not None
    assert found.is_hit.tolist() == is_hit
    assert (found.policy, found.slots) == (policy, slots)
    assert found.hits + found.misses == len(is_hit)
    assert found.hit_rate == found.hits / len(is_hit)
    assert found.bytes_fetched_experts == found.misses


@given(trace=traces, slots=st.integers(1, 30))
@settings(max_examples=200)
def test_belady_bounds_all(trace: Trace, slots: int) -> None:
    """Law: no policy has fewer misses than Belady; none has fewer than there are keys used."""
    results = simulate(trace, slots=[slots])
    assert [result.policy for result in results] == list(POLICIES)
    bound = results[-1].misses
    assert all(result.misses >= bound for result in results)
    assert bound >= len(Accesses.of(trace).most_used())


@given(trace=traces)
@settings(max_examples=50)
def test_with_a_slot_for_every_expert_each_is_read_once(trace: Trace) -> None:
    """Law: where all fits, every policy misses once for each key that is used."""
    num_keys = trace.num_layers * trace.num_experts
    for result in simulate(trace, slots=[num_keys, num_keys + 5]):
        assert result.misses == len(Accesses.of(trace).most_used())


def hits_of(trace: Trace, policy: str, slots: int, policy_trace: Trace) -> Array:
    (result,) = replay_all(
        Accesses.of(trace),
        slots=[slots],
        policies=[policy],
        policy_accesses=Accesses.of(policy_trace),
        keep_hits=True,
    )
    assert result.is_hit is not None
    assert not result.sees_future
    return result.is_hit


@pytest.mark.parametrize("policy", CAUSAL)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 20), data=st.data())
@settings(max_examples=40)
def test_the_future_changes_no_past_hit(
    policy: str, seed: int, slots: int, data: st.DataObject
) -> None:
    """Law: with other rows after any step, all accesses up to it hit or miss as before."""
    trace = make_trace(seed, num_tokens=30, rows_per_step=3)
    other = make_trace(seed + 1, num_tokens=30, rows_per_step=3)
    counted_on = make_trace(seed + 2, num_tokens=30)
    last = data.draw(st.sampled_from(sorted(set(trace.step.tolist()))), "last step kept")
    is_past = trace.step <= last
    topk = np.where(is_past[:, None, None], trace.topk, other.topk)
    changed = Trace.of({"topk": topk, "step": trace.step}, num_experts=trace.num_experts)
    num_past = sum(len(keys) for step, keys in visits_of(trace) if step <= last)
    before = hits_of(trace, policy, slots, counted_on)[:num_past]
    after = hits_of(changed, policy, slots, counted_on)[:num_past]
    assert before.tolist() == after.tolist()


def test_who_has_seen_the_future_says_so() -> None:
    """Law: Belady always has, and static when it counts on the trace it is replayed on."""
    trace = make_trace(0, num_tokens=10)

    def seeing(policy_trace: Trace | None) -> list[str]:
        results = simulate(trace, slots=[4], policy_trace=policy_trace)
        return [result.policy for result in results if result.sees_future]

    assert seeing(None) == ["static", "adapmoe", "belady"]
    assert seeing(trace) == ["belady"]


def test_static_keeps_what_the_policy_trace_uses_most() -> None:
    """Law: favourites come from the policy trace: they stay while others pass."""
    # One layer: 0 and 1 in turn, and 2 to 5 between; the policy trace knows 0 and 1 only.
    trace = Trace.of({"topk": np.array([0, 2, 1, 3, 0, 4, 1, 5] * 5).reshape(-1, 1, 1)})
    earlier = Trace.of({"topk": np.array([0, 1] * 9).reshape(-1, 1, 1)}, num_experts=8)
    (static,) = simulate(trace, slots=[3], policies=["static"], policy_trace=earlier)
    (lru,) = simulate(trace, slots=[3], policies=["lru"])
    assert static.misses == 2 + 20  # the favourites once, the others always
    assert lru.misses == 40


def test_progress_counts_replays() -> None:
    """Law: every pair of policy and size is announced, and the end."""
    heard = []
    replay_all(
        Accesses.of(make_trace(0, num_tokens=4)),
        slots=[2, 4],
        policies=["lru", "belady"],
        on_progress=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(done, 4) for done in range(5)]


def test_unknown_policies_are_refused() -> None:
    """Law: the nearest name is offered, and all there are."""
    trace = make_trace(0, num_tokens=4)
    with pytest.raises(ValueError, match=r"'lfuu'; did you mean 'lfu'\? there are lru, lfu, st"):
        simulate(trace, slots=[4], policies=["lfuu"])
    with pytest.raises(ValueError, match="'xyz'; there are lru"):
        simulate(trace, slots=[4], policies=["lru", "xyz"])


def test_impossible_sizes_are_refused() -> None:
    """Law: a cache has at least one slot."""
    with pytest.raises(ValueError, match="slots is 0; a cache needs at least 1 slot"):
        simulate(make_trace(0, num_tokens=4), slots=[4, 0])


def test_a_policy_trace_of_another_model_is_refused() -> None:
    """Law: favourites of a model with other layers or experts mean nothing here."""
    trace, other = (make_trace(0, num_tokens=4, num_experts=n) for n in (8, 16))
    with pytest.raises(ValueError, match="3 layers of 16 experts, the trace 3 of 8"):
        simulate(trace, slots=[4], policy_trace=other)


@pytest.mark.skipif(not GPT_OSS.exists(), reason="shared/traces/gptoss20b.npz is not there")
def test_gpt_oss_as_measured() -> None:
    """Law: hit rates on the first 6,000 tokens, LRU's recomputed by a simulator of a few lines."""
    trace = Trace.load(GPT_OSS, leave_out=["weights"]).select(np.arange(6000))
    results = simulate(trace, slots=[96, 192, 384], policies=["lru", "belady"])
    rates = [round(result.hit_rate, 3) for result in results]
    assert rates == [0.456, 0.632, 0.907, 0.638, 0.831, 0.965]
    for result in results[:3]:
        assert result.hits == pinned_lru_hits(trace.topk, result.slots)


@pytest.mark.skipif(not GPT_OSS.exists(), reason="shared/traces/gptoss20b.npz is not there")
def test_plec_learns_gpt_oss_while_it_runs() -> None:
    """Law: nothing fitted, it gains over a quarter of what Belady has over LRU in 2,000 tokens."""
    trace = Trace.load(GPT_OSS, leave_out=["weights"]).select(np.arange(2000))
    results = simulate(trace, slots=[192], policies=["lru", "plec", "belady"])
    closed = gap_closed(results[1], results)
    assert closed is not None
    assert closed > 0.25


def pinned_lru_hits(topk: Array, num_slots: int) -> int:
    """Least recently used over `[N, L, K]`, one token a step, what a layer needs not evicted."""
    oldest_first: dict[tuple[int, int], None] = {}
    hits = 0
    for token in np.sort(topk, axis=-1).tolist():
        for layer, experts in enumerate(token):
            keys = [(layer, expert) for expert in experts]
            for key in keys:
                if key in oldest_first:
                    hits += 1
                    del oldest_first[key]
                elif len(oldest_first) == num_slots:
                    del oldest_first[next(k for k in oldest_first if k not in keys)]
                oldest_first[key] = None
    return hits
