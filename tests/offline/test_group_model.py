"""What two groups would take: the formula, and what it cannot promise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.offline.group_model import GroupModel, PassTimes


def times(*, attention: float, stall: float = 0.0) -> PassTimes:
    """A pass of one second in one group, by shares."""
    return PassTimes(
        num_groups=1,
        num_tokens=100,
        num_keys=5000,
        seconds=1.0,
        attention_seconds=attention,
        stall_seconds=stall,
    )


@given(
    num_threads=st.integers(1, 64),
    num_layers=st.integers(1, 64),
    attention=st.floats(0, 1),
    stall=st.floats(0, 1),
)
def test_no_more_is_promised_than_all_of_attention(
    num_threads: int, num_layers: int, attention: float, stall: float
) -> None:
    """Law: products and waits for reads stay one after the other; one thread hides only waits."""
    stall *= 1 - attention
    one = times(attention=attention, stall=stall)
    model = GroupModel(num_threads=num_threads, num_layers=num_layers)
    assert 1 <= model.attention_threads(one) <= max(1, num_threads - 1)
    assert model.gain(one) <= attention + 1e-9
    if num_threads == 1:
        assert model.gain(one) <= min(attention, stall) + 1e-9


@given(attention=st.floats(0, 1), num_layers=st.integers(1, 63))
def test_more_layers_promise_more(attention: float, num_layers: int) -> None:
    """Law: the ends of a pass, where one group is alone, weigh less."""
    fewer, more = (GroupModel(num_threads=2, num_layers=num_layers + n) for n in (0, 1))
    one = times(attention=attention)
    assert fewer.gain(one) <= more.gain(one) + 1e-9


@pytest.mark.parametrize(
    ("num_threads", "num_layers", "attention", "stall", "seconds"),
    [
        # One layer has no middle: 0.5 sqrt(2) + 0.5 sqrt(2) / 2
        (2, 1, 0.5, 0.0, 0.75 * 2**0.5),
        (2, 16, 0.5, 0.0, 0.5 * 2**0.5 * (1 + 1 / 32)),
        # A fifth of the time is too little on two threads: more than a second.
        (2, 16, 0.2, 0.0, (0.8 + 0.2 / 32) * 2**0.5),
        # Waiting hides it: max(0.3 sqrt(2), 0.3 sqrt(2), 0.3 + 0.4)
        (2, 16, 0.3, 0.4, 0.7 + 0.3 * 2**0.5 / 32),
        # 2 of 16 attend, as one or three would take longer.
        (16, 16, 0.25, 0.0, 0.75 * (16 / 14) ** 0.5 + 0.25 * (16 / 2) ** 0.5 / 32),
        # Alone, a thread has all to do.
        (1, 16, 0.5, 0.1, 0.9),
    ],
)
def test_seconds_are_the_formula(
    num_threads: int, num_layers: int, attention: float, stall: float, seconds: float
) -> None:
    """Law: by the number of threads for attention that makes it smallest."""
    model = GroupModel(num_threads=num_threads, num_layers=num_layers)
    assert model.gain(times(attention=attention, stall=stall)) == pytest.approx(1 - seconds)


def test_passes_are_alike_by_their_tokens_and_their_keys() -> None:
    one = times(attention=0.1)
    assert one.is_like(one)
    for num_tokens, num_keys in ((100, 6000), (80, 5000)):
        other = PassTimes(
            num_groups=2,
            num_tokens=num_tokens,
            num_keys=num_keys,
            seconds=1.0,
            attention_seconds=0.0,
            stall_seconds=0.0,
        )
        assert not one.is_like(other)
