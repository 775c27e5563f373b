"""A pass cut into two groups of sequences that have about as much to do."""

from moe_runtime.offline.pass_scheduler import PassPlan
from moe_runtime.offline.sequence import Sequence


def cut_in_two(plan: PassPlan) -> tuple[PassPlan, PassPlan] | None:
    """Both groups, or None where there is one sequence: none is cut itself.

    The costliest first, each goes where less is: of the pass's tokens, which products take, and of
    the keys that their attention meets, counted alike as shares of all.
    """
    if len(plan.sequences) < 2:
        return None
    tokens = dict.fromkeys(plan.decoding, 1) | {one: one.num_tokens for one in plan.prompts}
    all_tokens, all_keys = plan.num_tokens, num_keys(plan)

    def cost(one: Sequence) -> float:
        return tokens[one] / all_tokens + one.num_tokens / all_keys

    costs = [0.0, 0.0]
    first: set[Sequence] = set()
    for one in sorted(plan.sequences, key=cost, reverse=True):
        is_first = costs[0] <= costs[1]
        costs[not is_first] += cost(one)
        if is_first:
            first.add(one)

    def group(is_first: bool) -> PassPlan:
        return PassPlan(
            decoding=tuple(one for one in plan.decoding if (one in first) == is_first),
            prompts=tuple(one for one in plan.prompts if (one in first) == is_first),
        )

    return group(True), group(False)


def num_keys(plan: PassPlan) -> int:
    """Keys that the sequences of a pass look at, this pass's included."""
    return sum(one.num_tokens for one in plan.sequences)
