"""Laws of splitting a trace: whole sequences, about the share asked for, in every domain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import TraceError
from moe_runtime.trace import Trace
from moe_runtime.trace_split import split_by_sequence


def trace_of(lengths: list[int], domains: list[str]) -> Trace:
    """A sequence of each length, in each its own row number as expert."""
    num_tokens = sum(lengths)
    sequence = np.random.default_rng(0).permutation(np.repeat(np.arange(len(lengths)), lengths))
    return Trace.of(
        {
            "topk": np.arange(num_tokens).reshape(-1, 1, 1) % 256,
            "sequence_id": sequence,
            "domain": np.array(domains)[sequence],
        },
        num_experts=256,
    )


@given(
    sequences=st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["code", "law"])), min_size=1, max_size=20
    ),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.9]),
)
def test_sequences_stay_whole(sequences: list[tuple[int, str]], share: float) -> None:
    """Law: every row is on one side, with its whole sequence; each domain keeps one to learn."""
    trace = trace_of([n for n, _ in sequences], [name for _, name in sequences])
    learn, held_out = split_by_sequence(trace, share)
    if held_out is None:
        assert learn.num_tokens == trace.num_tokens
        assert share == 0 or max(np.unique([n for _, n in sequences], return_counts=True)[1]) == 1
        return
    assert learn.num_tokens + held_out.num_tokens == trace.num_tokens
    assert not set(learn.sequence_id) & set(held_out.sequence_id)
    assert learn.domain is not None
    assert held_out.domain is not None
    assert set(learn.domain) == {name for _, name in sequences}
    for domain in set(held_out.domain):
        lengths = [n for n, name in sequences if name == domain]
        taken = int((held_out.domain == domain).sum())
        assert taken < share * sum(lengths) + max(lengths)
        if taken < share * sum(lengths):  # only where one must stay
            left = set(learn.sequence_id[learn.domain == domain])
            assert len(left) == 1


def test_the_split_is_the_trace_s_own() -> None:
    """Law: the same trace and share give the same split."""
    trace = trace_of([3] * 10, ["code"] * 10)
    first, second = (split_by_sequence(trace, 0.3)[1] for _ in range(2))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first.topk, second.topk)
    assert len(set(first.sequence_id)) == 3


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    """Law: something must be left to learn from."""
    with pytest.raises(TraceError, match="must be from 0 to less than 1"):
        split_by_sequence(trace_of([3, 3], ["a", "a"]), share)
