"""Laws of the predictive policy: it learns what repeats, and bad advice cannot mislead it long."""

from collections.abc import Callable, Mapping
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.policy import EvictionPolicy
from moe_runtime.cache.predictions import Predictions
from moe_runtime.cache.reuse_model import sigmoid
from moe_runtime.expert import ExpertKey

NUM_LAYERS, NUM_EXPERTS = 2, 6
SHAPE = (NUM_LAYERS, NUM_EXPERTS)
KEYS = [ExpertKey(layer, e) for layer in range(NUM_LAYERS) for e in range(NUM_EXPERTS)]

Visit = list[ExpertKey]
Advise = Callable[[list[Visit], int], Mapping[ExpertKey, float]]


def hits_by_visit(
    policy: EvictionPolicy, num_slots: int, visits: list[Visit], advise: Advise | None = None
) -> list[int]:
    cache = ExpertCache(num_slots, policy)
    found = []
    for now, visit in enumerate(visits):
        if advise is not None:
            policy.advise(advise(visits, now))
        held, _ = cache.decide(visit)
        found.append(sum(slot is not None for slot in held))
    return found


def cycle(num_tokens: int) -> list[Visit]:
    """Tokens take three paths in turn: of 12 experts each comes back every third token."""
    return [
        [ExpertKey(layer, 2 * (token % 3)), ExpertKey(layer, 2 * (token % 3) + 1)]
        for token in range(num_tokens)
        for layer in range(NUM_LAYERS)
    ]


def random_visits(seed: int, num_tokens: int) -> list[Visit]:
    rng = np.random.default_rng(seed)
    return [
        [ExpertKey(layer, int(e)) for e in sorted(rng.choice(NUM_EXPERTS, 2, replace=False))]
        for _ in range(num_tokens)
        for layer in range(NUM_LAYERS)
    ]


def truth(visits: list[Visit], now: int) -> dict[ExpertKey, float]:
    """Whether each key is used at the next visit of its layer."""
    found = dict.fromkeys(KEYS, 0.0)
    for layer in range(NUM_LAYERS):
        ahead = next((v for v in visits[now + 1 :] if v[0].layer == layer), [])
        found |= dict.fromkeys(ahead, 1.0)
    return found


def inverted(visits: list[Visit], now: int) -> dict[ExpertKey, float]:
    return {key: 1.0 - probability for key, probability in truth(visits, now).items()}


def test_a_planted_pattern_is_learned() -> None:
    """Law: on a loop just larger than the cache LRU never hits, and what learns comes to hit."""
    visits = cycle(300)
    late = slice(len(visits) // 2, None)
    assert sum(hits_by_visit(LRUPolicy(), 8, visits)[late]) == 0
    # Belady keeps 6 of 12 and swaps the rest: over half of its hits are asked for.
    assert sum(hits_by_visit(PLECPolicy(*SHAPE), 8, visits)[late]) > 0.35 * 2 * len(visits) / 2


def test_a_layer_tells_what_the_next_one_uses() -> None:
    """Law: where layer 1 copies a random layer 0, it is foretold once layer 0 has routed."""
    rng = np.random.default_rng(0)
    policy = PLECPolicy(*SHAPE)
    for expert in rng.integers(0, NUM_EXPERTS, 400).tolist():
        policy.visit([ExpertKey(0, expert)])
        wanted = policy.wanted()
        policy.visit([ExpertKey(1, expert)])
    assert wanted == [ExpertKey(1, expert)]


def test_a_use_is_worth_half_for_each_forward_that_it_lies_ahead() -> None:
    """Law: who leaves has the least mean of 2^(-forwards until the use), summed term by term."""
    policy = PLECPolicy(*SHAPE)
    for visit in random_visits(1, 40):
        policy.visit(visit)
        for key in visit:
            policy.touch(key)
    model = policy._model
    p, r = sigmoid(model.next_log_odds), sigmoid(model.later_log_odds())
    expected = p + (1 - p) * sum(r * (1 - r) ** (wait - 1) * 0.5**wait for wait in range(1, 60))
    expected[0] *= 0.5**0.5  # layer 1 ran last: layer 0 is one visit of two ahead
    expected[1] *= 0.5
    number = int(expected.argmin())
    assert policy.victim(frozenset()) == ExpertKey(*divmod(number, NUM_EXPERTS))
    best = ExpertKey(*divmod(int(expected.argmax()), NUM_EXPERTS))
    assert all(policy.is_sooner(best, key) for key in KEYS if key != best)


@given(
    visits=st.integers(0, 1000).map(lambda seed: random_visits(seed, 25)),
    nonsense=st.sampled_from([nan, inf, -inf, -0.1, 1.1]),
)
@settings(max_examples=30)
def test_what_is_no_probability_changes_no_decision(visits: list[Visit], nonsense: float) -> None:
    """Law: NaN, infinities, numbers outside [0, 1] and unknown keys are as if nothing was said."""
    said = dict.fromkeys([*KEYS, ExpertKey(9, 9), ExpertKey(-1, 0)], nonsense)
    silent = hits_by_visit(PLECPolicy(*SHAPE), 6, visits)
    assert hits_by_visit(PLECPolicy(*SHAPE), 6, visits, lambda *_: said) == silent
    later = Predictions(np.full(SHAPE, nonsense), np.full(SHAPE, nonsense))
    assert hits_by_visit(PLECPolicy(*SHAPE), 6, visits, lambda *_: later) == silent


def test_true_advice_helps_and_inverted_advice_is_found_out() -> None:
    """Law: on random routing the truth gives hits that nothing else can; its opposite costs few."""
    visits = random_visits(3, 500)
    silent = sum(hits_by_visit(PLECPolicy(*SHAPE), 6, visits))
    told = sum(hits_by_visit(PLECPolicy(*SHAPE), 6, visits, truth))
    misled = sum(hits_by_visit(PLECPolicy(*SHAPE), 6, visits, inverted))
    assert told > 1.2 * silent
    assert misled > 0.9 * silent


def test_arrays_and_mappings_advise_alike() -> None:
    """Law: how predictions are held changes nothing."""
    visits = random_visits(5, 60)

    def as_arrays(visits: list[Visit], now: int) -> Predictions:
        return Predictions.of(truth(visits, now), SHAPE)

    mapped = hits_by_visit(PLECPolicy(*SHAPE), 6, visits, truth)
    assert hits_by_visit(PLECPolicy(*SHAPE), 6, visits, as_arrays) == mapped


def test_predictions_are_a_mapping_of_what_is_said() -> None:
    """Law: a NaN is no entry, and all else reads as it was given."""
    given_ = {KEYS[1]: 0.25, KEYS[7]: 1.0}
    found = Predictions.of(given_, SHAPE)
    assert dict(found) == given_
    assert len(found) == 2
    with pytest.raises(KeyError):
        found[KEYS[0]]


@given(
    pinned=st.frozensets(st.sampled_from(KEYS)),
    visits=st.integers(0, 1000).map(lambda seed: random_visits(seed, 6)),
)
@settings(max_examples=100)
def test_the_victim_is_resident_and_not_pinned(
    pinned: frozenset[ExpertKey], visits: list[Visit]
) -> None:
    """Law: only who is there and free to go goes; asking changes nothing; if none is, None."""
    policy = PLECPolicy(*SHAPE)
    resident: set[ExpertKey] = set()
    for visit in visits:
        policy.visit(visit)
        for key in visit:
            policy.touch(key)
        resident |= set(visit)
        victim = policy.victim(pinned)
        assert victim == policy.victim(pinned)
        assert (victim is None) == (resident <= pinned)
        if victim is not None:
            assert victim in resident - pinned
            policy.forget(victim)
            resident.remove(victim)


def test_a_prefetch_takes_a_free_slot_or_one_of_who_is_expected_later() -> None:
    """Law: what the running layer needs stays, and nobody leaves for who is expected after him."""
    policy = PLECPolicy(*SHAPE)
    cache = ExpertCache(4, policy)
    for visit in cycle(60):
        cache.decide(visit)
    pinned = frozenset(visit)
    before = {key for key in KEYS if key in cache}
    for key in KEYS:
        if key in cache:
            continue
        victim = policy.victim(pinned)
        read = cache.prefetch(key, pinned, policy.is_sooner)
        if read is not None:
            assert victim is not None
            assert read[1] == victim
            assert key in cache
            assert victim not in cache
    assert pinned <= {key for key in KEYS if key in cache}
    assert len(cache) == len(before) == 4
    assert sum(counts.hits + counts.misses for counts in cache.counts.values()) == 2 * 120
