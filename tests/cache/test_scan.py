"""Passes over all layers: who stays in the cache."""

import pytest

from moe_runtime.cache.belady import BeladyPolicy
from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.expert import ExpertKey

NUM_LAYERS, NUM_EXPERTS, PASSES = 6, 8, 10


def hits(policy: EvictionPolicy, num_slots: int) -> int:
    cache = ExpertCache(num_slots, policy)
    for _ in range(PASSES):
        for layer in range(NUM_LAYERS):
            cache.admit([ExpertKey(layer, expert) for expert in range(NUM_EXPERTS)])
            assert len(cache) <= num_slots
    return sum(counts.hits for counts in cache.counts.values())


@pytest.mark.parametrize("num_slots", [9, 16, 20, 33, 40, 47, 48])
def test_no_policy_has_more_hits_when_all_experts_are_used(num_slots: int) -> None:
    """Law: as many as Belady's, who knows that each comes back a round later."""
    a_round = NUM_LAYERS * NUM_EXPERTS
    belady = BeladyPolicy(range(a_round, (PASSES + 1) * a_round))
    assert hits(ScanPolicy(), num_slots) == hits(belady, num_slots)


@pytest.mark.parametrize("num_slots", [9, 16, 20, 33, 40, 47, 48])
def test_no_policy_has_more_hits_when_two_groups_use_each_layer_in_turn(num_slots: int) -> None:
    """Law: the second finds what the first had, and from one pass to the next it is Belady's."""
    visit, two_rounds = NUM_EXPERTS, 2 * NUM_LAYERS * NUM_EXPERTS
    belady = BeladyPolicy(
        [
            # The second group comes a visit later, and the next pass behind it.
            position + (visit if position // visit % 2 == 0 else two_rounds - visit)
            for position in range(PASSES * two_rounds)
        ]
    )
    scan = ScanPolicy()

    def hits_of_groups(policy: EvictionPolicy) -> int:
        cache = ExpertCache(num_slots, policy)
        for _ in range(PASSES):
            for layer in range(NUM_LAYERS):
                for groups_to_come in (1, 0):
                    scan.groups_to_come = groups_to_come
                    cache.admit([ExpertKey(layer, expert) for expert in range(NUM_EXPERTS)])
        return sum(counts.hits for counts in cache.counts.values())

    assert hits_of_groups(scan) == hits_of_groups(belady)


def test_recency_hits_nothing_in_a_third_of_the_slots() -> None:
    assert hits(LRUPolicy(), 16) == 0 < hits(ScanPolicy(), 16)


def test_what_is_pinned_stays() -> None:
    policy = ScanPolicy()
    keys = [ExpertKey(0, 0), ExpertKey(1, 0)]
    for key in keys:
        policy.visit([key])
        policy.touch(key)
    assert policy.victim(frozenset()) == keys[1]
    assert policy.victim({keys[1]}) == keys[0]
    assert policy.victim(set(keys)) is None
    policy.forget(keys[1])
    policy.forget(keys[1])
    assert policy.victim(frozenset()) == keys[0]
