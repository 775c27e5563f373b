"""The closed forms choose the chunks that a simulation of the lanes would."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.perf.alpha_beta import AlphaBeta
from moe_runtime.perf.pipeline_degree import PipelineCost, Stage

MOST = 32
NONE = Stage(start_seconds=0.0, work_seconds=0.0)


def drawn(rng: np.random.Generator) -> Stage:
    """From microseconds to tens of milliseconds of work, and starts of 1 us to 1 ms."""
    start, work = 10 ** rng.uniform(-6, -3), 10 ** rng.uniform(-6, -1.5)
    return Stage(start_seconds=float(start), work_seconds=float(work))


def simulate(cost: PipelineCost, degree: int) -> float:
    """Event by event: a lane between ranks, one within nodes, one of experts, each in order.

    Between ranks all dispatches come before the first combine, within nodes all gathers before the
    first scatter; a task begins when its lane is free and what it needs is there.
    """
    x, y, e = (
        stage.chunk_seconds(degree) for stage in (cost.transfer, cost.within_node, cost.experts)
    )
    between = within = computing = 0.0
    gathered, computed, scattered = [], [], []
    for _ in range(degree):
        between += x / 2
        within = max(within, between) + y / 2
        gathered.append(within)
    for at in gathered:
        computing = max(computing, at) + e
        computed.append(computing)
    for at in computed:
        within = max(within, at) + y / 2
        scattered.append(within)
    for at in scattered:
        between = max(between, at) + x / 2
    return between


def worst_regret(costs: list[PipelineCost]) -> float:
    worst = 0.0
    for cost in costs:
        best = min(simulate(cost, degree) for degree in range(1, MOST + 1))
        worst = max(worst, simulate(cost, cost.best_degree(MOST)) / best - 1)
    return worst


def test_regret_is_below_one_percent_on_a_thousand_settings() -> None:
    """Law: of a simulation, whose best is found by trying all; transfers and experts alone."""
    rng = np.random.default_rng(0)
    costs = [
        PipelineCost(transfer=drawn(rng), within_node=NONE, experts=drawn(rng)) for _ in range(1000)
    ]
    assert worst_regret(costs) < 0.01
    assert len({cost.best_degree(MOST) for cost in costs}) > 10, "settings of all kinds"


def test_regret_with_nodes_is_below_one_percent_too() -> None:
    """Law: the same with a third lane."""
    rng = np.random.default_rng(1)
    costs = [
        PipelineCost(transfer=drawn(rng), within_node=drawn(rng), experts=drawn(rng))
        for _ in range(1000)
    ]
    assert worst_regret(costs) < 0.01


stages = st.builds(Stage, start_seconds=st.floats(1e-7, 1e-2), work_seconds=st.floats(1e-7, 1e-1))


@given(stages, stages, stages, st.integers(1, 64))
def test_no_other_degree_is_better_by_the_forms(x: Stage, y: Stage, e: Stage, most: int) -> None:
    """Law: zero regret by the forms themselves, and the smallest of equals."""
    cost = PipelineCost(transfer=x, within_node=y, experts=e)
    best = min(range(1, most + 1), key=cost.seconds)
    assert math.isclose(cost.seconds(cost.best_degree(most)), cost.seconds(best), rel_tol=1e-12)


@given(st.floats(1e-5, 1e-2), st.floats(0, 1))
def test_one_chunk_where_starting_costs_more_than_moving(start: float, share: float) -> None:
    """Law: decoding: work below the start of a message and of the experts is not cut up."""
    stage = Stage(start_seconds=start, work_seconds=share * start)
    cost = PipelineCost(transfer=stage, within_node=NONE, experts=stage)
    assert cost.best_degree(MOST) == 1


def test_long_work_is_cut_up() -> None:
    """Law, by hand: X and E of 1 s, starts of 10 ms: at r = 10, 0.11 + 1.1 s, not 2.02."""
    stage = Stage(start_seconds=0.01, work_seconds=1.0)
    cost = PipelineCost(transfer=stage, within_node=NONE, experts=stage)
    assert cost.best_degree(MOST) == 10
    assert math.isclose(cost.seconds(10), 0.11 + 1.1)
    assert math.isclose(cost.seconds(1), 2.02)


@given(st.floats(1e-7, 1e-2), st.floats(1e-12, 1e-7))
def test_a_fit_finds_the_line_that_made_the_samples(alpha: float, beta: float) -> None:
    sizes = [2.0**power for power in range(10, 25)]
    found = AlphaBeta.fit(sizes, [alpha + beta * n for n in sizes])
    assert math.isclose(found.beta_seconds, beta, rel_tol=1e-6)
    assert math.isclose(found.alpha_seconds, alpha, rel_tol=1e-3, abs_tol=1e-6 * beta * sizes[-1])
    assert found.r_squared > 1 - 1e-9


def test_small_sizes_count_as_much_as_large_ones() -> None:
    """Law: one large sample that is 10 % off moves the start by no more than 10 %."""
    sizes = [2.0**power for power in range(10, 25)]
    seconds = [1e-4 + 1e-9 * n for n in sizes]
    seconds[-1] *= 1.1
    assert math.isclose(AlphaBeta.fit(sizes, seconds).alpha_seconds, 1e-4, rel_tol=0.1)


def test_a_fit_is_never_below_zero() -> None:
    """Law: samples that would make the start negative give a start of zero."""
    found = AlphaBeta.fit([1, 2, 3], [0.01, 1.0, 2.0])
    assert found.alpha_seconds == 0
    assert 0 < found.beta_seconds < 1
