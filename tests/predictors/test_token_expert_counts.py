"""Laws of counting experts by token id."""

import numpy as np
import pytest

from moe_runtime.errors import TraceError
from moe_runtime.predictors.token_expert_counts import token_expert_counts
from moe_runtime.trace import Trace


def test_counts_are_those_of_the_rows() -> None:
    """Law: every known expert of a row with a known id counts once, and nothing else does."""
    rng = np.random.default_rng(0)
    topk = np.argsort(rng.random((50, 3, 8)), axis=2)[..., :2]
    topk[rng.random(topk.shape) < 0.2] = -1
    token_id = rng.integers(-1, 12, 50)
    trace = Trace.of({"topk": topk, "token_id": token_id}, num_experts=8)
    found = token_expert_counts([trace, trace])
    assert found is not None
    expected = np.zeros((3, token_id.max() + 1, 8))
    for row, token in zip(topk, token_id, strict=True):
        for layer in range(3):
            for expert in row[layer]:
                if expert >= 0 and token >= 0:
                    expected[layer, token, expert] += 2
    np.testing.assert_array_equal(found, expected)


def test_without_ids_there_are_no_counts() -> None:
    """Law: a trace without token ids gives None; one with ids beyond memory is refused."""
    topk = np.zeros((2, 4, 1), int)
    assert token_expert_counts([Trace.of({"topk": topk})]) is None
    wide = Trace.of({"topk": topk, "token_id": np.array([0, 2**31 - 1])}, num_experts=8)
    with pytest.raises(TraceError, match=r"would take .* GiB, more than 4"):
        token_expert_counts([wide])
