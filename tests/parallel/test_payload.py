"""Hidden states in messages, exact and rounded."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.parallel.make_dispatcher import check_dispatch
from moe_runtime.parallel.payload import PAYLOADS, make_payload

floats = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize("name", PAYLOADS)
@given(st.lists(st.lists(floats, min_size=3, max_size=3), max_size=4))
def test_rows_come_back_as_near_as_the_payload_says(name: str, rows: list[list[float]]) -> None:
    """Law: exact to the bit, bfloat16 to 2^-8 of a number, int8 to half a 127th of the largest."""
    payload = make_payload(name)
    sent = torch.tensor(rows).reshape(-1, 3)
    packed = payload.encode(sent)
    assert packed.shape == (len(rows), payload.row_bytes(3, torch.float32))
    found = payload.decode(packed, torch.float32)
    assert found.dtype == torch.float32
    for row, back in zip(sent.tolist(), found.tolist(), strict=True):
        largest = max(map(abs, row))
        for x, y in zip(row, back, strict=True):
            bound = {"exact": 0, "bfloat16": abs(x) / 2**8, "int8": largest / 127 * 0.501}[name]
            assert abs(x - y) <= bound + 1e-38


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_does_not_come_back_as_one(bad: float) -> None:
    """Law: a row with a NaN or an infinity is not finite after int8 either; others are whole."""
    payload = make_payload("int8")
    found = payload.decode(payload.encode(torch.tensor([[1.0, bad], [127.0, 1.0]])), torch.float32)
    assert not found[0].isfinite().any()
    assert found[1].tolist() == [127.0, 1.0]


def test_what_cannot_be_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="'fp4' is unknown; choose from exact, bfloat16, int8"):
        make_payload("fp4")
    with pytest.raises(ValueError, match="'int8' rounds rows, and dispatch 'allreduce' adds"):
        check_dispatch("allreduce", "int8")
    with pytest.raises(ValueError, match="'fast' is unknown; choose from auto, alltoall, allreduc"):
        check_dispatch("fast", "exact")
