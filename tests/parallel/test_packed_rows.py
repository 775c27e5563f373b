"""Rows as bytes and back."""

import itertools

import pytest
import torch

from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.packed_rows import pack_rows, unpack_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("hidden", "weights"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_rows_come_back_whole(
    num_rows: int, top_k: int, hidden: torch.dtype, weights: torch.dtype
) -> None:
    """Law: every bit, whatever the sizes do to the alignment of a row; and the bytes foretold."""
    torch.manual_seed(0)
    rows = Rows(
        torch.randn(num_rows, 5).to(hidden),
        torch.randint(0, 32767, (num_rows, top_k)),
        torch.randn(num_rows, top_k).to(weights),
    )
    packed = pack_rows(rows)
    assert packed.shape == (num_rows, rows.row_bytes().routed)
    found = unpack_rows(packed, rows)
    for name in ("hidden", "index", "weights"):
        assert torch.equal(getattr(found, name), getattr(rows, name)), name
        assert getattr(found, name).dtype == getattr(rows, name).dtype
