"""One group or two: tried where it may be worth it, and decided by the clock."""

import pytest

from moe_runtime.offline.group_choice import GroupChoice
from moe_runtime.offline.group_model import GroupModel, PassTimes


def times(
    *,
    num_groups: int = 1,
    num_tokens: int = 100,
    seconds: float = 1.0,
    attention: float = 0.0,
    stall: float = 0.0,
) -> PassTimes:
    return PassTimes(
        num_groups=num_groups,
        num_tokens=num_tokens,
        num_keys=50 * num_tokens,
        seconds=seconds,
        attention_seconds=attention * seconds,
        stall_seconds=stall * seconds,
    )


def run(
    choice: GroupChoice, num_passes: int, *, attention: float, two: float, sizes: tuple[int, ...]
) -> list[int]:
    """The groups of each pass, where two take `two` times as long as one."""
    ran = []
    for number in range(num_passes):
        num_tokens = sizes[number % len(sizes)]
        num_groups = choice.num_groups
        seconds = num_tokens * (two if num_groups == 2 else 1.0) * (1 + 0.01 * (number % 3))
        choice.add(
            times(
                num_groups=num_groups, num_tokens=num_tokens, seconds=seconds, attention=attention
            )
        )
        ran.append(num_groups)
    return ran


MODEL = GroupModel(num_threads=4, num_layers=16)
ALIKE, MIXED = (100,), (100, 103, 98, 900)


@pytest.mark.parametrize("sizes", [ALIKE, MIXED])
def test_the_faster_kind_stays(sizes: tuple[int, ...]) -> None:
    """Law: by seconds a token of passes of one size; others beside them do not matter."""
    won, lost = (GroupChoice("auto", MODEL) for _ in range(2))
    assert run(won, 60, attention=0.6, two=0.8, sizes=sizes)[-20:] == [2] * 20
    assert run(lost, 60, attention=0.6, two=1.2, sizes=sizes)[-20:] == [1] * 20
    for choice, groups, ratio in ((won, 2, 0.8), (lost, 1, 1.2)):
        found = choice.report()
        assert (found["groups"], found["trials"]) == (groups, 1)
        assert found["two_token_seconds"] / found["one_token_seconds"] == pytest.approx(ratio, 0.03)
        assert found["attention_share"] == pytest.approx(0.6)


def test_where_attention_is_small_nothing_is_tried() -> None:
    choice = GroupChoice("auto", MODEL)
    assert run(choice, 500, attention=0.02, two=0.5, sizes=ALIKE) == [1] * 500
    assert choice.report()["trials"] == 0


def test_what_loses_is_tried_ever_less() -> None:
    """Law: one in a hundred passes of a long run at most; what wins is asked again, too."""
    choice = GroupChoice("auto", MODEL)
    ran = run(choice, 2000, attention=0.6, two=1.5, sizes=ALIKE)
    assert 2 <= choice.report()["trials"] <= 5
    assert ran.count(2) <= 20
    turned = GroupChoice("auto", MODEL)
    run(turned, 60, attention=0.6, two=0.8, sizes=ALIKE)
    assert run(turned, 200, attention=0.6, two=1.5, sizes=ALIKE)[-20:] == [1] * 20


def test_passes_that_are_never_of_one_size_decide_nothing() -> None:
    """Law: a trial ends all the same, with one group, and no figures."""
    choice = GroupChoice("auto", MODEL)
    sizes = tuple(100 * 2**n for n in range(40))
    assert run(choice, 40, attention=0.6, two=0.5, sizes=sizes)[-10:] == [1] * 10
    found = choice.report()
    assert (found["groups"], found["trials"]) == (1, 1)
    assert found["one_token_seconds"] is None or found["two_token_seconds"] is None


@pytest.mark.parametrize(("setting", "refusal"), [("1", ""), ("auto", "why"), ("2", "why")])
def test_one_group_stays_where_it_is_asked_for_or_must_be(setting: str, refusal: str) -> None:
    choice = GroupChoice(setting, MODEL, refusal=refusal)
    assert run(choice, 99, attention=0.6, two=0.5, sizes=ALIKE) == [1] * 99
    assert choice.report()["refusal"] == (refusal or None)


def test_two_groups_stay_once_the_threads_can_be_shared() -> None:
    choice = GroupChoice("2", GroupModel(num_threads=8, num_layers=16))
    assert run(choice, 9, attention=0.5, two=2.0, sizes=ALIKE) == [1] + [2] * 8
    assert choice.shares == (4, 4)
