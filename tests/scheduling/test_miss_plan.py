"""Laws of the miss plan: the least makespan there is, by trying everything."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.scheduling.miss_costs import MissCosts
from moe_runtime.scheduling.miss_plan import Miss, MissPlan, plan_all, plan_misses

SECONDS = st.floats(1e-6, 1e-1)


@st.composite
def measured(draw: st.DrawFn) -> MissCosts:
    """Costs that grow with tokens, as if each class had been measured."""
    costs = MissCosts()
    costs.copy.add(draw(SECONDS))
    costs.read.add(draw(SECONDS))
    for cost in (costs.device, costs.host):
        seconds = draw(SECONDS)
        for num_tokens in (1, 2, 4, 8):
            cost.add(num_tokens, seconds)
            seconds *= draw(st.floats(1, 2.5))
    return costs


def makespan(
    copied: tuple[Miss, ...], computed: tuple[Miss, ...], held: list[int], costs: MissCosts
) -> float:
    """Time until link, device and CPU are done, with experts in host memory, in these orders."""
    link = 0.0
    device = sum(costs.device.seconds(n) for n in held)
    for miss in copied:
        link += costs.copy.value
        device = max(device, link) + costs.device.seconds(miss.num_tokens)
    return max(device, sum(costs.host.seconds(miss.num_tokens) for miss in computed))


@given(
    costs=measured(),
    tokens=st.lists(st.integers(1, 8), max_size=5),
    held=st.lists(st.integers(1, 8), max_size=3),
)
def test_no_assignment_and_no_order_is_faster(
    costs: MissCosts, tokens: list[int], held: list[int]
) -> None:
    """Law: for few misses in host memory the plan is optimal over all assignments and orders."""
    misses = [Miss(expert, n) for expert, n in enumerate(tokens)]
    best = min(
        makespan(order, tuple(m for m in misses if m not in order), held, costs)
        for count in range(len(misses) + 1)
        for order in itertools.permutations(misses, count)
    )
    plan = plan_misses(misses, held, costs)
    assert plan.seconds == pytest.approx(best)
    assert makespan(plan.copied, plan.computed, held, costs) == pytest.approx(best)


@given(
    costs=measured(),
    drawn=st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=8),
    held=st.lists(st.integers(1, 8), max_size=3),
)
def test_every_miss_goes_one_way(
    costs: MissCosts, drawn: list[tuple[int, bool]], held: list[int]
) -> None:
    """Law: each miss is copied or computed, once; no plan that treats all alike is faster."""
    misses = [Miss(expert, n, on_disk) for expert, (n, on_disk) in enumerate(drawn)]
    plan = plan_misses(misses, held, costs)
    assert sorted((*plan.copied, *plan.computed), key=lambda m: m.expert) == misses
    assert sorted(plan.order) == [m.expert for m in misses]
    for is_copied in (True, False):
        alike = plan_all(misses, held, costs, is_copied=is_copied)
        assert plan.seconds <= alike.seconds * (1 + 1e-9)


@given(costs=measured(), tokens=st.lists(st.integers(1, 300), min_size=30, max_size=60))
def test_many_misses_copy_those_with_most_tokens(costs: MissCosts, tokens: list[int]) -> None:
    """Law: beyond the exact size no plan by tokens, and none that treats all alike, is faster."""
    misses = [Miss(expert, n) for expert, n in enumerate(tokens)]
    plan = plan_misses(misses, [], costs)
    by_tokens = sorted(misses, key=lambda m: -m.num_tokens)
    best = min(
        makespan(tuple(by_tokens[:count]), tuple(by_tokens[count:]), [], costs)
        for count in range(len(misses) + 1)
    )
    assert plan.seconds == pytest.approx(best)
    if plan.copied and plan.computed:
        assert min(m.num_tokens for m in plan.copied) >= max(m.num_tokens for m in plan.computed)


def test_equal_times_copy_more() -> None:
    """Law: where the CPU wins nothing, experts are copied, as later layers gain from it."""
    costs = MissCosts()
    costs.copy.add(1.0)
    costs.host.add(1, 2.0)
    plan = plan_misses([Miss(0, 1), Miss(1, 1)], [], costs)
    assert plan == MissPlan(copied=(Miss(0, 1), Miss(1, 1)), computed=(), seconds=2.0)


def test_disk_comes_behind_memory() -> None:
    """Law: experts in host memory pass the link while others are still read."""
    costs = MissCosts()
    costs.copy.add(1.0)
    costs.read.add(3.0)
    costs.host.add(1, 100.0)
    plan = plan_misses([Miss(0, 1, is_on_disk=True), Miss(1, 1)], [], costs)
    assert plan.order == (1, 0)
    assert plan.seconds == 4.0


@given(costs=measured())
def test_costs_grow_with_tokens(costs: MissCosts) -> None:
    """Law: what was never measured is borrowed, so that more tokens never cost less."""
    for cost in (costs.device, costs.host):
        seconds = [cost.seconds(n) for n in range(1, 200)]
        assert seconds == sorted(seconds)
        assert cost.seconds(64) == pytest.approx(8 * cost.seconds(8))
