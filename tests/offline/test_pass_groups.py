"""A pass cut in two: everybody in one group, and both with about as much to do."""

from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.offline.pass_groups import cut_in_two, num_keys
from moe_runtime.offline.pass_scheduler import PassPlan
from moe_runtime.offline.sequence import Sequence


def plan_of(contexts: list[int], prompts: list[int]) -> PassPlan:
    lengths = contexts + prompts
    sequences = [
        Sequence(number=number, prompt_ids=[1] * length, max_new_tokens=1)
        for number, length in enumerate(lengths)
    ]
    return PassPlan(
        decoding=tuple(sequences[: len(contexts)]), prompts=tuple(sequences[len(contexts) :])
    )


LENGTHS = st.lists(st.integers(1, 4000), max_size=20)


@given(contexts=LENGTHS, prompts=LENGTHS)
def test_each_sequence_is_in_one_group_and_in_its_order(
    contexts: list[int], prompts: list[int]
) -> None:
    """Law: of tokens and of keys, counted as shares, no group has more than half and a sequence."""
    plan = plan_of(contexts, prompts)
    groups = cut_in_two(plan)
    if len(plan.sequences) < 2:
        assert groups is None
        return
    assert groups is not None
    for kind in ("decoding", "prompts"):
        all_of = list(getattr(plan, kind))
        parts = [list(getattr(group, kind)) for group in groups]
        assert sorted(parts[0] + parts[1], key=all_of.index) == all_of
        assert all(part == sorted(part, key=all_of.index) for part in parts)
    assert all(group.sequences for group in groups)

    def load(part: PassPlan) -> float:
        return part.num_tokens / plan.num_tokens + num_keys(part) / num_keys(plan)

    def alone(one: Sequence) -> float:
        is_prompt = one in plan.prompts
        return load(PassPlan(decoding=() if is_prompt else (one,), prompts=(one,) * is_prompt))

    largest = max(map(alone, plan.sequences))
    assert abs(load(groups[0]) - load(groups[1])) <= largest + 1e-9


def test_long_contexts_and_long_prompts_are_shared_out() -> None:
    groups = cut_in_two(plan_of([1000] * 8, [500, 500]))
    assert groups is not None
    assert [len(group.decoding) for group in groups] == [4, 4]
    assert [len(group.prompts) for group in groups] == [1, 1]
