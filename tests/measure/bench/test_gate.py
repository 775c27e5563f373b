"""No speed without equal outputs: the gate is green for equal logits and red for altered ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.measure.bench.gate import Logits, compare_logits


def random_logits(seed: int = 0) -> Logits:
    return np.random.default_rng(seed).standard_normal((4, 50)).astype(np.float32)


def test_equal_bits_are_green_whatever_the_tolerance() -> None:
    gate = compare_logits(random_logits(), random_logits(), tolerance=0.0)
    assert gate.is_green
    assert gate.is_bit_equal
    assert gate.text() == "equal bits"


@given(row=st.integers(0, 3), column=st.integers(0, 49))
def test_one_altered_bit_is_red_when_bits_are_asked_for(row: int, column: int) -> None:
    found = random_logits()
    found[row, column] = np.nextafter(found[row, column], np.float32(9))
    gate = compare_logits(found, random_logits(), tolerance=0.0)
    assert not gate.is_green
    assert gate.text().startswith("RED")


@given(error=st.floats(1e-4, 0.5))
def test_the_tolerance_is_for_the_median_token(error: float) -> None:
    expected = random_logits()
    found = expected * np.float32(1 + error)
    found[2] *= 1.2
    gate = compare_logits(found, expected, tolerance=0.05)
    assert gate.relative_error == pytest.approx(error, rel=1e-2)
    assert gate.worst_error > gate.relative_error
    assert gate.is_green == (gate.relative_error < 0.05)


def test_other_successors_are_red_however_small_the_error() -> None:
    expected = random_logits()
    expected[:, 0] = expected[:, 1] = 5
    expected[:, 0] += 1e-3
    found = expected.copy()
    found[:, 1] += 2e-3
    gate = compare_logits(found, expected, tolerance=0.05)
    assert gate.relative_error < 0.05
    assert not gate.is_green


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_is_red(value: float) -> None:
    found = random_logits()
    found[1, 1] = value
    assert not compare_logits(found, random_logits(), tolerance=0.05).is_green


def test_as_many_tokens_are_compared_as_both_have() -> None:
    gate = compare_logits(random_logits()[:2], random_logits(), tolerance=0.0)
    assert gate.is_green
    assert gate.num_tokens == 2


def test_another_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(4, 49\) cannot be compared with \(4, 50\)"):
        compare_logits(random_logits()[:, :49], random_logits(), tolerance=0.05)
