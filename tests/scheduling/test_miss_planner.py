"""Laws of the miss planner: it learns what each way costs, and drops what measures worse."""

import itertools
import random

import pytest

from moe_runtime.scheduling.miss_plan import Miss, MissPlan, MissWay
from moe_runtime.scheduling.miss_planner import MissPlanner

MISSES = [Miss(expert, 1) for expert in range(4)]


def taught(copy_seconds: float, host_seconds: float) -> MissPlanner:
    """A planner that has seen each way once."""
    planner = MissPlanner(MissWay.AUTO)
    planner.costs.copy.add(copy_seconds)
    planner.costs.host.add(1, host_seconds)
    return planner


def test_each_way_is_tried_before_it_is_judged() -> None:
    """Law: 'auto' copies the first miss, then lets the CPU compute one, then plans by costs."""
    planner = MissPlanner(MissWay.AUTO)
    assert not planner.plan(MISSES[:1], []).computed
    planner.costs.copy.add(1.0)
    assert planner.plan(MISSES[:1], []).computed == (MISSES[0],)
    assert len(planner.plan(MISSES, []).computed) == 1
    planner.costs.host.add(1, 1.0)
    assert len(planner.plan(MISSES, []).computed) == 2


@pytest.mark.parametrize("way", [MissWay.COPY, MissWay.CPU])
def test_a_way_that_is_asked_for_is_taken(way: MissWay) -> None:
    """Law: 'copy' and 'cpu' hold whatever was measured; the CPU does nothing where it cannot."""
    planner = MissPlanner(way)
    planner.costs.copy.add(1.0)
    planner.costs.host.add(1, 1.0)
    plan = planner.plan(MISSES, [])
    assert (len(plan.copied), len(plan.computed)) == ((4, 0) if way is MissWay.COPY else (0, 4))
    assert not planner.plan(MISSES, [], can_compute=False).computed


def measure(planner: MissPlanner, slowdown: float, num_layers: int) -> list[bool]:
    """Layers in which plans with CPU experts take `slowdown` times what they promise."""
    taken = []
    for _ in range(num_layers):
        plan = planner.plan(MISSES, [])
        taken.append(bool(plan.computed))
        planner.observe(plan, plan.seconds * (slowdown if plan.computed else 1.0))
    return taken


def test_a_choice_that_measures_worse_is_dropped() -> None:
    """Law: plans that take three times what they promise end, but for a try now and then."""
    taken = measure(taught(1.0, 1.0), 3.0, 1000)
    assert taken[0]
    first_drop = taken.index(False)
    assert first_drop < 10
    later = taken[first_drop:]
    assert 0 < sum(later) < len(later) / 100


def test_a_choice_that_keeps_its_promise_stays() -> None:
    """Law: plans that take what they promise are kept, but for a try of the other now and then."""
    taken = measure(taught(1.0, 1.0), 1.0, 1000)
    assert sum(taken) > 990


def test_a_dropped_choice_comes_back() -> None:
    """Law: once the machine is as promised again, the dropped kind is found out and used."""
    planner = taught(1.0, 1.0)
    measure(planner, 3.0, 200)
    assert sum(measure(planner, 1.0, 20_000)[-500:]) > 490


def test_small_differences_do_not_flip_the_choice() -> None:
    """Law: measurements that scatter by 5 % do not make it change its mind again and again."""
    rng, planner, taken = random.Random(0), taught(1.0, 1.0), []
    for _ in range(200):
        plan = planner.plan(MISSES, [])
        taken.append(bool(plan.computed))
        # CPU experts slow the link down just so much that both kinds take about as long.
        even = 2.0 if plan.computed else 1.0
        planner.observe(plan, plan.seconds * even * rng.uniform(0.95, 1.05))
    flips = sum(before != after for before, after in itertools.pairwise(taken))
    assert flips <= 2


def test_decisions_follow_from_measurements() -> None:
    """Law: the same layers and the same measurements give the same plans."""

    def run() -> list[MissPlan]:
        rng, planner, plans = random.Random(1), MissPlanner(MissWay.AUTO), []
        for _ in range(300):
            misses = [Miss(e, rng.randint(1, 4)) for e in range(rng.randint(0, 5))]
            plan = planner.plan(misses, [1])
            plans.append(plan)
            planner.observe(plan, rng.random())
            planner.costs.copy.add(rng.random())
            planner.costs.host.add(rng.randint(1, 4), rng.random())
        return plans

    assert run() == run()


def test_a_stall_is_what_missing_experts_add() -> None:
    """Law: copies beside which the device computes stall nothing; the rest of them does."""
    planner = MissPlanner(MissWay.COPY)
    planner.costs.copy.add(2.0)
    planner.costs.device.add(1, 1.0)
    plan = planner.plan(MISSES[:2], [])  # copied by 2 and 4, computed by 3 and 5
    assert planner.stall_seconds(plan, [1, 1]) == 3.0
    plan = planner.plan(MISSES[:1], [1] * 5)
    assert planner.stall_seconds(plan, [1] * 6) == 0.0
