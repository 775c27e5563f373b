"""Who runs in which pass: everything ends, nothing is lost, and pages are never short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.kernels.cpu.attention_status import PAGE_TOKENS
from moe_runtime.offline.cohort_scheduler import CohortScheduler
from moe_runtime.offline.page_table import PageTable, pages_for
from moe_runtime.offline.pass_scheduler import PassScheduler
from moe_runtime.offline.sequence import Sequence

SIZES = st.lists(
    st.tuples(st.integers(1, 3 * PAGE_TOKENS), st.integers(1, 3 * PAGE_TOKENS)),
    min_size=1,
    max_size=12,
)


def sequences_of(sizes: list[tuple[int, int]]) -> list[Sequence]:
    return [
        Sequence(number=number, prompt_ids=[1] * prompt, max_new_tokens=new)
        for number, (prompt, new) in enumerate(sizes)
    ]


def ends_at(sequence: Sequence) -> int:
    """Some stop early."""
    return max(1, sequence.max_new_tokens - sequence.number % 5)


@given(
    sizes=SIZES,
    spare_pages=st.integers(0, 20),
    limit=st.integers(1, 200),
    most=st.integers(1, 8),
)
def test_every_sequence_gets_all_its_tokens_within_the_pages(
    sizes: list[tuple[int, int]], spare_pages: int, limit: int, most: int
) -> None:
    sequences = sequences_of(sizes)
    table = PageTable(max(pages_for(one.most_tokens) for one in sequences) + spare_pages)
    scheduler = PassScheduler(sequences, table, pass_tokens=lambda: limit, max_sequences=most)
    stored: dict[int, int] = {}  # tokens whose keys are there
    while (plan := scheduler.next_pass()) is not None:
        assert len(plan.sequences) <= most
        assert plan.num_tokens <= limit or len(plan.prompts) <= 1
        in_use = [page for one in plan.sequences for page in table.pages(one.number)]
        assert len(in_use) == len(set(in_use)) == table.num_pages - table.num_free
        for one in plan.decoding:
            assert stored[one.number] == one.num_tokens - 1
            assert one.written
        for one in plan.sequences:
            stored[one.number] = one.num_tokens
            assert len(table.pages(one.number)) >= pages_for(one.num_tokens)
            one.written.append(1)
            if len(one.written) == ends_at(one):
                scheduler.finish(one)
    assert [len(one.written) for one in sequences] == [ends_at(one) for one in sequences]
    assert table.num_free == table.num_pages


def test_a_sequence_is_preempted_for_those_before_it_and_goes_on() -> None:
    sequences = sequences_of([(PAGE_TOKENS, PAGE_TOKENS), (PAGE_TOKENS - 4, 2 * PAGE_TOKENS)])
    table = PageTable(3)
    # The first fits with its growth; the second is let in, and both grow.
    scheduler = PassScheduler(sequences, table, pass_tokens=lambda: 99, max_sequences=8)
    resumed_with = []
    while (plan := scheduler.next_pass()) is not None:
        resumed_with += [len(one.written) for one in plan.prompts]
        for one in plan.sequences:
            one.written.append(1)
            if len(one.written) == one.max_new_tokens:
                scheduler.finish(one)
    assert scheduler.num_preempted >= 1
    assert resumed_with[:2] == [0, 0]
    assert all(num_written > 0 for num_written in resumed_with[2:])


def test_without_need_nothing_is_preempted() -> None:
    sequences = sequences_of([(40, 40)] * 6)
    table = PageTable(sum(pages_for(one.most_tokens) for one in sequences))
    scheduler = PassScheduler(sequences, table, pass_tokens=lambda: 999, max_sequences=8)
    plan = scheduler.next_pass()
    assert plan is not None
    assert len(plan.prompts) == 6
    assert scheduler.num_preempted == 0


@given(sizes=SIZES, spare_pages=st.integers(0, 20), most=st.integers(1, 8))
def test_a_cohort_fits_to_its_end(
    sizes: list[tuple[int, int]], spare_pages: int, most: int
) -> None:
    """Law: padded to the longest, no cohort of several takes more than there is."""
    sequences = sequences_of(sizes)
    table = PageTable(max(pages_for(sum(size)) for size in sizes) + spare_pages)
    scheduler = CohortScheduler(sequences, table, max_sequences=most)
    while (plan := scheduler.next_pass()) is not None:
        assert not (plan.decoding and plan.prompts)
        cohort = plan.prompts
        if len(cohort) > 1:
            longest = max(len(one.prompt_ids) for one in cohort)
            longest += max(one.max_new_tokens for one in cohort)
            assert len(cohort) * pages_for(longest) <= table.num_pages
        for one in plan.sequences:
            one.written.append(1)
            if len(one.written) == ends_at(one):
                scheduler.finish(one)
    assert all(len(one.written) == ends_at(one) for one in sequences)


def test_pages_come_back() -> None:
    table = PageTable(4)
    table.hold(1, PAGE_TOKENS + 1)
    assert not table.can_hold(2, 3 * PAGE_TOKENS)
    assert table.most_used == 2
    table.release(1)
    assert table.can_hold(2, 4 * PAGE_TOKENS)
    with pytest.raises(AssertionError):
        table.hold(2, 5 * PAGE_TOKENS)
