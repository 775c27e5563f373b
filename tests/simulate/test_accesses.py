"""Laws of the accesses of a trace: those of the runtime, no more, no fewer, in its order."""

from collections import Counter

import numpy as np
from hypothesis import given, settings

from moe_runtime.expert import ExpertKey
from moe_runtime.simulate import accesses as accesses_file
from moe_runtime.simulate.accesses import Accesses
from moe_runtime.trace import Trace
from tests.simulate.traces import make_trace, traces, visits_of


@given(trace=traces)
@settings(max_examples=200)
def test_visits_are_those_of_the_definition(trace: Trace) -> None:
    """Law: a visit is the distinct experts of one step in one layer, ascending."""
    accesses = Accesses.of(trace)
    expected = list(visits_of(trace))
    assert list(accesses.visits()) == [keys for _, keys in expected]
    assert accesses.step.tolist() == [step for step, _ in expected]
    all_keys = [key for _, keys in expected for key in keys]
    assert len(accesses) == len(all_keys)
    assert accesses.layer.tolist() == [key.layer for key in all_keys]
    assert accesses.expert.tolist() == [key.expert for key in all_keys]


@given(trace=traces)
@settings(max_examples=200)
def test_next_uses_are_those_of_the_definition(trace: Trace) -> None:
    """Law: each access knows when its key is used next; never is beyond the end, all different."""
    accesses = Accesses.of(trace)
    keys = [key for keys in accesses.visits() for key in keys]
    found = accesses.next_uses().tolist()
    for now, (key, next_use) in enumerate(zip(keys, found, strict=True)):
        later = [time for time in range(now + 1, len(keys)) if keys[time] == key]
        assert next_use == later[0] if later else next_use >= len(keys)
    assert len(set(found)) == len(found)


@given(trace=traces)
@settings(max_examples=100)
def test_most_used_is_sorted_by_accesses(trace: Trace) -> None:
    """Law: keys used most come first, lower keys first among equals, unused ones not at all."""
    uses = Counter(key for _, keys in visits_of(trace) for key in keys)
    assert Accesses.of(trace).most_used() == sorted(uses, key=lambda key: (-uses[key], key))


def test_more_visits_than_a_block() -> None:
    """Law: how many visits become objects at a time changes nothing."""
    trace = make_trace(0, num_tokens=accesses_file._BLOCK_VISITS // 2, num_layers=3)
    visits = list(Accesses.of(trace).visits())
    assert len(visits) > accesses_file._BLOCK_VISITS
    assert visits == [keys for _, keys in visits_of(trace)]


def test_many_keys_are_told_apart() -> None:
    """Law: numbers of keys beyond 16 bits are not confused."""
    topk = np.zeros((2, 3, 1), np.int16)
    topk[:, 2] = 2
    accesses = Accesses.of(Trace.of({"topk": topk}, num_experts=2**15))
    assert list(accesses.visits())[2] == [ExpertKey(2, 2)]
    assert accesses.next_uses().tolist()[:3] == [3, 4, 5]
