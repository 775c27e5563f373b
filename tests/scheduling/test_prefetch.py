"""Laws of what is read ahead: the probable and near first, nothing that is no probability."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.lru import LRUPolicy
from moe_runtime.cache.plec import PLECPolicy
from moe_runtime.cache.predictions import Predictions
from moe_runtime.expert import ExpertKey
from moe_runtime.scheduling.prefetch import (
    Forecaster,
    PredictedUse,
    PrefetchLedger,
    reads_that_fit,
)

L, E = 3, 4
NAN = float("nan")


def said(**cells: float) -> Predictions:
    """`l1e2=0.9`: the rest is unsaid."""
    found = np.full((L, E), NAN)
    for name, value in cells.items():
        found[int(name[1]), int(name[3])] = value
    return Predictions(found)


def test_the_probable_and_the_near_come_first() -> None:
    """Law: keys are wanted by probability over visits until their use, absent ones alone."""
    use = PredictedUse({ExpertKey(1, 0)})
    use.advise(said(l1e0=1.0, l1e1=0.6, l2e2=0.9, l0e3=0.99, l1e2=0.4), layer=0)
    # 0.6 in one visit, 0.9 in two, 0.99 in three; 0.4 is too little, and (1, 0) is there.
    assert use.wanted() == [ExpertKey(1, 1), ExpertKey(2, 2), ExpertKey(0, 3)]
    assert use.is_sooner(ExpertKey(1, 1), ExpertKey(2, 2))
    assert use.is_sooner(ExpertKey(2, 2), ExpertKey(2, 0))  # of which nothing is said
    assert not use.is_sooner(ExpertKey(2, 0), ExpertKey(2, 1))


@given(
    cells=st.lists(
        st.sampled_from([NAN, float("inf"), -float("inf"), -0.1, 1.5, 2.0, 0.0, 0.3]),
        min_size=L * E,
        max_size=L * E,
    ),
    layer=st.integers(-1, L - 1),
    policy=st.sampled_from(["lru", "plec"]),
)
def test_what_is_no_probability_is_never_wanted(
    cells: list[float], layer: int, policy: str
) -> None:
    """Law: NaN, infinities and numbers outside [0, 1] cause no read and take nobody's slot."""
    cache = ExpertCache(4, LRUPolicy() if policy == "lru" else PLECPolicy(L, E))
    cache.decide([ExpertKey(0, 0), ExpertKey(0, 1)])
    forecaster = Forecaster(cache)
    forecaster.advise(Predictions(np.array(cells).reshape(L, E)), layer)
    cache.decide([ExpertKey(1, 0)])
    assert forecaster.wanted() == []
    if policy == "lru":
        keys = [ExpertKey(layer, expert) for layer in range(L) for expert in range(E)]
        assert not any(
            forecaster.is_worth(a, b)
            for a in keys
            for b in keys
            if not 0.0 <= cells[a.layer * E + a.expert] <= 1.0
        )


def test_a_policy_with_an_outlook_is_asked_itself() -> None:
    """Law: plec weighs predictions with what it learnt; no second opinion stands beside it."""
    policy = PLECPolicy(L, E)
    forecaster = Forecaster(ExpertCache(4, policy))
    told = said(l1e1=0.9999)
    for _ in range(3):
        forecaster.advise(told, 0)
        policy.visit([ExpertKey(0, 0)])
        assert forecaster.wanted() == policy.wanted()


@given(idle=st.floats(-1.0, 1e9), read=st.floats(0.0, 1e9))
def test_reads_that_fit_begin_while_the_disk_is_idle(idle: float, read: float) -> None:
    """Law: the last of them begins before the idle time ends, and one more would not."""
    number = reads_that_fit(idle, read)
    if read == 0.0:  # not known
        assert number == 1
    elif idle <= 0.0:
        assert number == 0
    elif number < 2**31:
        assert (number - 1) * read <= idle * (1 + 1e-9)
        assert number * read >= idle * (1 - 1e-9)


def all_read(key: ExpertKey) -> float:
    return 1.0


def test_every_read_ahead_ends_up_used_or_wasted() -> None:
    """Law: of what was begun each is used, or wasted with its share read, or still there."""
    ledger = PrefetchLedger()
    a, b, c, d = (ExpertKey(1, expert) for expert in range(4))
    gone = ExpertKey(2, 0)
    for key, evicted in ((a, None), (b, gone), (c, None), (d, None)):
        ledger.start(key, evicted)
    assert ledger.awaited == {a, b, c, d}
    wrong = ledger.visit([a, ExpertKey(1, 9)], set(), lambda key: 0.75)
    assert wrong == [b, c, d]
    ledger.cancel(b, 0.0)
    ledger.leave(c, 0.5)
    assert ledger.num_unused == 1
    assert ledger.awaited == set()
    counts = ledger.counts
    assert (counts.started, counts.used, counts.cancelled) == (4, 1, 1)
    assert (counts.hidden, counts.wasted) == (0.75, 0.5)
    ledger.visit([gone], set(), all_read)
    assert counts.regrets == 1
    ledger.clear()
    assert counts.wasted == 1.5
    assert ledger.is_empty


def test_what_left_and_was_not_missed_is_no_regret() -> None:
    """Law: only a demand of what made room, and is not back, counts against a read ahead."""
    ledger = PrefetchLedger()
    gone, back = ExpertKey(2, 0), ExpertKey(2, 1)
    ledger.start(ExpertKey(1, 0), gone)
    ledger.start(ExpertKey(1, 1), back)
    ledger.visit([back, ExpertKey(2, 3)], {back}, all_read)
    assert ledger.counts.regrets == 0
    ledger.visit([gone], set(), all_read)  # a forward later it might have left anyway
    assert ledger.counts.regrets == 0


def test_a_mispredicted_resident_leaves_first() -> None:
    """Law: what was demoted makes room before the policy's own victim, unless it is used again."""
    cache = ExpertCache(3, LRUPolicy())
    a, b, c, d, e = (ExpertKey(0, expert) for expert in range(5))
    cache.decide([a])
    cache.decide([b])
    cache.decide([c])
    cache.demote(c)
    assert cache.decide([d])[1] == [(cache.slot(d), c)]
    cache.demote(b)
    cache.decide([b])
    assert cache.decide([e])[1][0][1] == a


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=30))
def test_reading_ahead_never_evicts_what_is_pinned(uses: list[tuple[int, int]]) -> None:
    """Law: whatever was demoted, what the running layer needs stays."""
    cache = ExpertCache(3, LRUPolicy())
    for layer, expert in uses:
        key = ExpertKey(layer, expert)
        cache.decide([key])
        other = ExpertKey(layer, (expert + 1) % 4)
        cache.demote(key)
        if other not in cache:
            read = cache.prefetch(other, {key}, lambda key, victim: True)
            assert read is None or read[1] != key
        assert key in cache
        assert len(cache) <= 3


def test_what_is_said_to_plec_is_not_kept_for_nan() -> None:
    """Law: a policy that was told NaN evicts as one that was told nothing."""
    told, untold = PLECPolicy(L, E), PLECPolicy(L, E)
    rng = np.random.default_rng(0)
    caches = ExpertCache(4, told), ExpertCache(4, untold)
    for number in range(60):
        layer = number % L
        told.advise(Predictions(np.full((L, E), NAN)))
        keys = [ExpertKey(layer, e) for e in sorted(rng.choice(E, 2, replace=False).tolist())]
        assert caches[0].decide(keys) == caches[1].decide(keys)


@pytest.mark.parametrize("layer", [-1, 0, L - 1])
def test_distance_counts_visits_to_come(layer: int) -> None:
    """Law: the next layer is one visit away, the one that runs a whole forward."""
    use = PredictedUse(set())
    use.advise(said(l0e0=0.9, l1e0=0.9, l2e0=0.9), layer)
    assert [key.layer for key in use.wanted()] == [(layer + n) % L for n in range(1, L + 1)]
