"""Queues that bring requests for the same experts together, and leave none behind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.expert import ExpertKey
from moe_runtime.scheduling.expert_queues import ExpertQueues, Request


def request(number: int, *experts: int, num_tokens: int = 1) -> Request:
    keys = frozenset(ExpertKey(0, expert) for expert in experts)
    return Request(number=number, num_tokens=num_tokens, experts=keys)


def numbers(batch: list[Request]) -> list[int]:
    return [taken.number for taken in batch]


def test_the_longest_queue_goes_first_and_oldest_first() -> None:
    queues = ExpertQueues(max_tokens=3, max_passes=9)
    for number, expert in enumerate([1, 2, 1, 2, 2]):
        queues.push(request(number, expert))
    assert numbers(queues.next_batch()) == [1, 3, 4]
    assert numbers(queues.next_batch()) == [0, 2]
    assert queues.next_batch() == []


def test_a_batch_is_filled_up_from_the_next_longest_queue() -> None:
    queues = ExpertQueues(max_tokens=4, max_passes=9)
    for number, expert in enumerate([5, 1, 1, 2, 2, 2]):
        queues.push(request(number, expert))
    assert numbers(queues.next_batch()) == [3, 4, 5, 1]


def test_requests_with_no_expected_expert_run_too() -> None:
    queues = ExpertQueues(max_tokens=2, max_passes=9)
    for number in range(3):
        queues.push(request(number))
    assert numbers(queues.next_batch()) == [0, 1]
    assert numbers(queues.next_batch()) == [2]


arrivals = st.lists(
    st.lists(
        st.tuples(st.frozensets(st.integers(0, 5), max_size=3), st.integers(1, 4)), max_size=6
    ),
    max_size=15,
)


@given(arrivals, st.integers(4, 12), st.integers(0, 4))
def test_nobody_is_passed_over_too_often_and_everybody_runs_once(
    waves: list[list[tuple[frozenset[int], int]]], max_tokens: int, max_passes: int
) -> None:
    queues = ExpertQueues(max_tokens=max_tokens, max_passes=max_passes)
    arrived: dict[int, tuple[int, int]] = {}  # number -> batch, and the older ones that waited
    served: dict[int, int] = {}
    batch_index = 0
    while batch_index < len(waves) or len(queues):
        for experts, num_tokens in waves[batch_index] if batch_index < len(waves) else ():
            number = len(arrived)
            arrived[number] = batch_index, len(queues)
            queues.push(request(number, *experts, num_tokens=num_tokens))
        waiting = len(queues)
        batch = queues.next_batch()
        assert bool(batch) == bool(waiting)
        assert sum(taken.num_tokens for taken in batch) <= max_tokens
        for taken in batch:
            assert taken.number not in served
            served[taken.number] = batch_index
        batch_index += 1
    assert served.keys() == arrived.keys()
    for number, (since, num_older) in arrived.items():
        assert served[number] - since <= max_passes + num_older


@given(st.lists(st.frozensets(st.integers(0, 3), max_size=2), max_size=20))
def test_with_no_patience_the_order_is_that_of_arrival(wanted: list[frozenset[int]]) -> None:
    queues = ExpertQueues(max_tokens=3, max_passes=0)
    for number, experts in enumerate(wanted):
        queues.push(request(number, *experts))
    order = []
    while len(queues):
        order += numbers(queues.next_batch())
    assert order == sorted(order)


def test_what_can_never_run_is_refused() -> None:
    queues = ExpertQueues(max_tokens=4, max_passes=1)
    with pytest.raises(ValueError, match="5 tokens and a batch holds 4; raise max_tokens"):
        queues.push(request(0, 1, num_tokens=5))
    queues.push(request(0, 1))
    with pytest.raises(ValueError, match="request 0 waits already"):
        queues.push(request(0, 1))
    with pytest.raises(ValueError, match="give at least 1 token"):
        ExpertQueues(max_tokens=0, max_passes=1)
