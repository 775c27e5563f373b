"""The C quantiser writes the bytes that torch's does, whatever the weights."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.kernels.cpu.quantise import Quantiser, load_quantiser
from moe_runtime.kernels.quantise import QUANTISED_DTYPES, QuantisedDtype, quantise


def run(
    quantiser: Quantiser, w: torch.Tensor, dtype: QuantisedDtype
) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = (torch.full_like(part, 77) for part in quantise(w, dtype))
    quantiser(w, dtype, values, scales)
    return values, scales


def assert_same(w: torch.Tensor, dtype: QuantisedDtype) -> None:
    expected = quantise(w, dtype)
    found = run(load_quantiser(), w, dtype)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@given(
    num_rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    size=st.sampled_from([1e-41, 1e-38, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(QUANTISED_DTYPES),
)
@settings(max_examples=80, deadline=None)
def test_equals_torch(
    num_rows: int, groups: int, size: float, seed: int, dtype: QuantisedDtype
) -> None:
    """Law: in every byte, from denormals to what nearly overflows, half steps included."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(num_rows, 32 * groups, generator=generator)
    w[0] = torch.randint(-14, 15, w[0].shape, generator=generator) / 2
    assert_same((w * size).bfloat16(), dtype)


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_all_bit_patterns(dtype: QuantisedDtype) -> None:
    """Law: a row or group with an infinity or NaN becomes NaN, and no other does."""
    words = torch.randperm(2**16, generator=torch.Generator().manual_seed(0)) - 2**15
    for w in (words, words & 0x3FFF, words & 0x1F):
        assert_same(w.to(torch.int16).view(torch.bfloat16).view(-1, 64), dtype)


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_rows_of_any_length(dtype: QuantisedDtype) -> None:
    """Law: the last group of int4 may be shorter; int4 rows are even."""
    for num_columns in (2, 30, 34, 144, 200, *((1, 31, 33) if dtype == "int8" else ())):
        assert_same(torch.randn(3, num_columns).bfloat16(), dtype)


def test_without_a_library_torch_computes(tmp_path: Path) -> None:
    w = torch.randn(4, 64).bfloat16()
    for one, other in zip(
        run(load_quantiser(tmp_path), w, "int4"), quantise(w, "int4"), strict=True
    ):
        assert torch.equal(one, other)


def test_too_little_room_is_refused() -> None:
    w = torch.randn(4, 64).bfloat16()
    values, scales = quantise(w, "int8")
    with pytest.raises(ValueError, match=r"must be \(512, 256, 16\) contiguous bytes"):
        load_quantiser()(w, "int8", values[:3], scales)
