"""Laws of `expert_memory`: what people write means one number of bytes, or raises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import BudgetError
from moe_runtime.expert_memory import ExpertMemory, format_bytes

TOTAL = 10_000


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [
        (1, 1), ("1", 1), ("1b", 1), ("512MiB", 512 * 2**20), ("512 mib", 512 * 2**20),
        ("512MB", 512 * 10**6), ("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("2TiB", 2 * 2**40),
        ("1.5KiB", 1536), (" 3KB ", 3000), (10**13, 10**13),
    ],
)  # fmt: skip
def test_sizes(written: str | int, num_bytes: int) -> None:
    """Law: binary and decimal units, in any case, are exact."""
    assert ExpertMemory.parse(written) == ExpertMemory(num_bytes=num_bytes)


@pytest.mark.parametrize(
    ("written", "share"),
    [(0.25, 0.25), ("25%", 0.25), ("0.25", 0.25), (1.0, 1.0), ("100%", 1.0), ("33.5 %", 0.335)],
)
def test_shares(written: str | float, share: float) -> None:
    """Law: fractions and percentages are shares of all expert bytes."""
    memory = ExpertMemory.parse(written)
    assert memory.num_bytes is None
    assert memory.share == pytest.approx(share)


@pytest.mark.parametrize("written", ["auto", "AUTO", " auto "])
def test_auto(written: str) -> None:
    """Law: 'auto' is neither a size nor a share: all experts if they fit, else what is free."""
    memory = ExpertMemory.parse(written)
    assert memory == ExpertMemory()
    assert memory.resolve(expert_total_bytes=TOTAL, available_bytes=TOTAL * 9) == TOTAL
    assert memory.resolve(expert_total_bytes=TOTAL, available_bytes=123) == 123


@pytest.mark.parametrize(
    "written",
    [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), "0", "0%", "101%", "1.5", "-3GiB", "", "  ",
     "lots", "5 apples", "GiB", "12MiBs", "1e9", "1,5GiB", "0B", "0.1B", True, False],
)  # fmt: skip
def test_nonsense_raises(written: str | float) -> None:
    """Law: anything else raises BudgetError that quotes it and says how to write it."""
    with pytest.raises(BudgetError, match="'512MiB'") as caught:
        ExpertMemory.parse(written)
    assert repr(written) in str(caught.value)


@given(
    memory=st.one_of(
        st.integers(1, 10**15).map(ExpertMemory.parse),
        st.floats(0, 1, exclude_min=True).map(ExpertMemory.parse),
        st.just(ExpertMemory()),
    ),
    total=st.integers(1, 10**13),
    available=st.integers(-(10**12), 10**13),
)
def test_never_more_than_all_experts(memory: ExpertMemory, total: int, available: int) -> None:
    """Law: no budget exceeds all experts, and 'auto' never exceeds what is free."""
    resolved = memory.resolve(expert_total_bytes=total, available_bytes=available)
    assert resolved <= total
    if memory == ExpertMemory():
        assert resolved <= available


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5.2 * 2**20, "5.2 MiB"),
     (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB"), (-2048, "-2.0 KiB")],
)  # fmt: skip
def test_format(num_bytes: float, text: str) -> None:
    """Law: sizes are shown in the largest binary unit that leaves at least 1."""
    assert format_bytes(num_bytes) == text
