"""Search obeys every constraint, never beats a proof, and ends when it is told to."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import PlacementError
from moe_runtime.placement import anneal
from moe_runtime.placement.anneal import start_annealing
from moe_runtime.placement.anneal_status import (
    ACTIVE,
    NOT_BUILT,
    anneal_status,
    open_anneal_library,
)
from moe_runtime.placement.check import check
from moe_runtime.placement.cost_model import CostModel, paid_for_hops, to_placement
from moe_runtime.placement.descent import descend, greedy_assignment, random_assignment
from moe_runtime.placement.exact import solve_exactly
from moe_runtime.placement.objective import Objective
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.recombine import recombine
from moe_runtime.placement.replicate import replicate
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.solve import solve
from moe_runtime.placement.topology import Topology
from moe_runtime.placement.workers import Control, run_jobs
from tests.placement.problems import make_problem, model_of, objectives, placement_of, seeds

CLOSE = 1e-9
ENGINES = ["numpy", pytest.param("compiled", marks=pytest.mark.skipif(
    anneal_status() != ACTIVE, reason="no compiled library: pip install -e . with a C compiler"
))]  # fmt: skip


def use(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "numpy":
        monkeypatch.setattr(anneal, "open_anneal_library", lambda: NOT_BUILT)


@pytest.mark.parametrize("engine", ENGINES)
@given(
    seed=seeds,
    objective=objectives,
    gpus=st.sampled_from([2, 3, 6]),
    slots=st.sampled_from([12, 18]),
    nodes=st.sampled_from([1, 1, 2]),
    penalty=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=6)
def test_the_sum_of_changes_is_the_change_of_the_objective(
    engine: str,
    seed: int,
    objective: Objective,
    gpus: int,
    slots: int,
    nodes: int,
    penalty: float,
) -> None:
    """Whatever is swapped, prices kept beside the assignment stay those of the assignment."""
    problem = make_problem(
        seed, num_experts=12, gpus=gpus, nodes=nodes if gpus % nodes == 0 else 1,
        objective=objective, num_slots=slots, balance=1.1, num_layers=4,
    )  # fmt: skip
    expert, gpu = replicate(problem.counts.loads, slots, gpus, good_enough=2.0)
    model = CostModel.of(problem, expert)

    def cost(assignment: np.ndarray) -> float:
        over = np.maximum(model.gpu_loads(assignment) - 1.1, 0).sum()
        # The sum over replicas is what the engine sees; the nearest is what the objective takes.
        return replace(model, is_flat=True).objective(assignment) + penalty * float(over)

    with pytest.MonkeyPatch.context() as patch:
        use(engine, patch)
        annealing = start_annealing(model, gpu, seed)
    before = cost(annealing.gpu)
    changed = annealing.sweep(200, 0.01, penalty)
    assert cost(annealing.gpu) - before == pytest.approx(changed, abs=CLOSE)
    before = cost(annealing.gpu)
    gained = annealing.descend(penalty)
    assert gained <= 0
    assert cost(annealing.gpu) - before == pytest.approx(gained, abs=CLOSE)
    assert (np.bincount(annealing.gpu.ravel(), minlength=gpus) == slots // gpus * 4).all()
    check(to_placement(problem, expert, annealing.gpu, {}), replace(problem, balance=None))


@pytest.mark.parametrize("engine", ENGINES)
def test_search_reaches_the_optimum_of_small_problems_and_never_less(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(engine, monkeypatch)
    for seed in range(1 if engine == "numpy" else 3):
        problem = make_problem(seed, num_experts=8, gpus=2, num_layers=4, balance=1.4)
        exact = solve(problem, solver="dp")
        found = solve(problem, solver="search", num_processes=1)
        assert found.objective >= exact.objective - CLOSE
        assert found.objective <= exact.objective * 1.02
        assert found.lower_bound <= exact.objective + CLOSE


def test_the_same_seed_finds_the_same_placement_in_any_number_of_processes() -> None:
    problem = make_problem(1, num_experts=16, gpus=4, num_layers=5, planted=0.3, balance=1.1)
    one = solve(problem, solver="search", seed=5, num_processes=1)
    two = solve(problem, solver="search", seed=5, num_processes=2)
    assert np.array_equal(one.placement.slots, two.placement.slots)


@given(seed=seeds)
@settings(max_examples=5)
def test_renaming_experts_changes_no_optimum(seed: int) -> None:
    problem = make_problem(seed, num_experts=8, gpus=2, num_layers=3)
    names = np.random.default_rng(seed).permutation(8)
    counts = problem.counts
    renamed = replace(
        counts,
        transitions=counts.transitions[:, names][:, :, names],
        loads=counts.loads[:, names],
        coactivation=counts.coactivation[:, names][:, :, names],
    )
    other = replace(problem, counts=renamed)
    assert solve(other).objective == pytest.approx(solve(problem).objective, abs=CLOSE)


@given(seed=seeds, nodes=st.sampled_from([1, 2]))
@settings(max_examples=10)
def test_renaming_gpus_changes_no_objective(seed: int, nodes: int) -> None:
    """Any renaming where hops cost the same; nodes as a whole where they do not."""
    problem = make_problem(seed, num_experts=8, gpus=4, nodes=nodes, objective=Objective(
        transitions=1.0, fanout=0.5, load=0.1,
    ))  # fmt: skip
    model = model_of(problem)
    gpu = random_assignment(model, seed)
    rng = np.random.default_rng(seed)
    names = rng.permutation(4) if nodes == 1 else np.array([3, 2, 1, 0])
    assert model.objective(names[gpu]) == pytest.approx(model.objective(gpu), abs=CLOSE)


@given(seed=seeds, nodes=st.sampled_from([1, 2]), balance=st.sampled_from([None, 2.0]))
@settings(max_examples=20)
def test_recombining_is_at_least_as_good_as_the_best_it_was_given(
    seed: int, nodes: int, balance: float | None
) -> None:
    problem = make_problem(
        seed, num_experts=8, gpus=4, nodes=nodes, num_layers=5, balance=balance,
        objective=Objective(transitions=1.0, fanout=0.3, load=0.1),
    )  # fmt: skip
    model = model_of(problem)
    pool = [random_assignment(model, seed + i) for i in range(5)]
    found = recombine(model, pool)
    assert model.objective(found) <= min(map(model.objective, pool)) + CLOSE
    worst = max(model.gpu_loads(gpu).max() for gpu in pool)
    assert model.gpu_loads(found).max() <= worst + CLOSE


@given(seed=seeds, is_flat=st.booleans())
@settings(max_examples=20)
def test_hops_cost_what_the_matrix_says(seed: int, is_flat: bool) -> None:
    """Sums over each GPU's items, then their prices: the product of the two matrices."""
    rng = np.random.default_rng(seed)
    costs = 3.0 * (1 - np.eye(4)) if is_flat else rng.random((4, 4))
    gpu, tokens = rng.permutation(12) % 4, rng.random((12, 5))
    found = paid_for_hops(costs, gpu, tokens, is_flat=is_flat)
    np.testing.assert_allclose(found, costs[:, gpu] @ tokens)


@given(seed=seeds, nodes=st.sampled_from([1, 2]))
@settings(max_examples=20)
def test_descent_never_raises_the_objective_and_stays_balanced_in_numbers(
    seed: int, nodes: int
) -> None:
    model = model_of(make_problem(seed, num_experts=8, gpus=4, nodes=nodes, num_layers=4))
    for start in (random_assignment(model, seed), greedy_assignment(model, seed)):
        found = descend(model, start)
        assert model.objective(found) <= model.objective(start) + CLOSE
        assert all((np.bincount(row, minlength=4) == 2).all() for row in found)


@pytest.mark.parametrize("balance", [1.02, 1.1])
@pytest.mark.parametrize("slots", [24, 28])
def test_every_layer_is_within_the_limit(balance: float, slots: int) -> None:
    problem = make_problem(
        2, num_experts=24, gpus=4, num_layers=2, balance=balance, num_slots=slots, planted=0.5
    )
    result = solve(problem, solver="search")  # solve checks; this is the independent sum
    loads = problem.counts.loads
    for layer, held in enumerate(result.placement.by_gpu()):
        copies = np.bincount(held.ravel(), minlength=24)
        per_gpu = (loads[layer] / copies)[held].sum(axis=1)
        assert per_gpu.max() <= (balance + 1e-6) * per_gpu.mean()


def test_a_limit_that_nothing_meets_is_refused_with_the_smallest_that_was_met() -> None:
    problem = make_problem(0, num_experts=16, gpus=8, balance=1.001)
    with pytest.raises(PlacementError, match=r"within 1.001 .* found feasible is [0-9.]+, for"):
        solve(problem)
    smallest = 8 * problem.counts.loads.max(axis=1) / problem.counts.loads.sum(axis=1)
    assert smallest.max() > 1.001  # one expert alone is too much for a GPU


def test_a_price_of_moving_keeps_experts_where_they_were() -> None:
    problem = make_problem(4, num_experts=8, gpus=2, num_layers=4)
    start = placement_of(problem, random_assignment(model_of(problem), 0))
    moved = []
    for move_cost in (0.0, 0.02, 10.0):
        priced = replace(problem, previous=start, move_cost=move_cost)
        held = solve(priced, solver="search").placement.hosts()
        moved.append(int((held & ~start.hosts()).sum()))
    assert moved[0] > moved[1] > moved[2] == 0


def test_nodes_that_are_far_apart_are_crossed_less() -> None:
    problem = make_problem(1, num_experts=16, gpus=4, num_layers=6, planted=0.4)
    far = replace(problem, topology=Topology.of_nodes(2, 4, intra=1.0, inter=10.0))
    crossings = []
    for asked in (problem, far):
        found = solve(asked, solver="search").placement.gpu_of()
        flow = problem.counts.transitions
        crossings.append(
            sum(
                (flow[i] * (found[i][:, None] // 2 != found[i + 1][None, :] // 2)).sum()
                for i in range(5)
            )
        )
    assert crossings[1] < crossings[0]


def test_costs_in_one_direction_only_are_understood() -> None:
    """Hops to a lower rank are free, so nothing needs to cost anything."""
    costs = np.triu(np.ones((3, 3)), 1)
    problem = replace(
        make_problem(1, num_experts=3, gpus=3, num_layers=3), topology=Topology.from_matrix(costs)
    )
    best = solve(problem, solver="dp")
    found = solve(problem, solver="search")
    assert found.objective == pytest.approx(best.objective, abs=CLOSE)


def test_the_time_limit_ends_the_search_with_a_feasible_placement() -> None:
    problem = make_problem(1, num_experts=64, gpus=8, num_layers=24, balance=1.1)
    result = solve(problem, solver="search", time_limit_seconds=0.5)
    assert result.stopped_by == "time_limit"
    assert result.status == "feasible"


def test_an_interrupt_returns_the_best_so_far(capfd: pytest.CaptureFixture[str]) -> None:
    problem = make_problem(1, num_experts=64, gpus=8, num_layers=24, balance=1.1)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        result = solve(problem, solver="search", time_limit_seconds=600)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, previous)
    assert result.stopped_by == "interrupted"
    assert result.seconds < 5  # of 600: the search's last step and a quick bound
    check(result.placement, problem)
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_interrupt_ends_jobs_that_do_not_stop() -> None:
    """The first is for the jobs to see; the second ends their processes, and is raised."""
    presses: list[int] = []

    def deaf(control: Control) -> int:
        time.sleep(600)
        return 0

    def press() -> None:
        presses.append(1)
        raise KeyboardInterrupt

    control = Control(600)
    others = set(multiprocessing.active_children())  # of other tests
    with pytest.raises(KeyboardInterrupt):
        run_jobs([deaf, deaf], control, num_processes=2, on_progress=press)
    assert len(presses) == 2
    assert control.was_interrupted
    assert set(multiprocessing.active_children()) <= others


def test_a_worker_that_fails_is_heard() -> None:
    def fail(control: Control) -> int:
        raise PlacementError("no")

    def die(control: Control) -> int:
        os._exit(9)

    with pytest.raises(PlacementError, match=r"^no$"):
        run_jobs([fail], Control(10), num_processes=1)
    with pytest.raises(PlacementError, match="died with exit code"):
        run_jobs([die], Control(10), num_processes=1)


def test_results_come_back_in_the_order_of_jobs() -> None:
    def wait(number: int, control: Control) -> int:
        time.sleep(0.02 * (number % 3))
        return number

    jobs = [lambda control, n=n: wait(n, control) for n in range(7)]
    assert run_jobs(jobs, Control(10), num_processes=3) == list(range(7))


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    problem = make_problem(1, num_experts=16, gpus=4, num_layers=3)
    solve(problem, solver="search", on_progress=lambda *step: seen.append(step))
    assert seen
    assert all(done <= total for done, total in seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_library_of_another_version_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "anneal_library.so").write_bytes(b"\x7fELF nonsense")
    found = open_anneal_library(tmp_path)
    assert isinstance(found, str)
    assert "another version" in found
    assert open_anneal_library(tmp_path / "absent") == NOT_BUILT


def test_search_never_beats_the_dynamic_programme_with_fan_out() -> None:
    objective = Objective(transitions=1.0, fanout=0.5, load=0.1)
    problem = make_problem(9, num_experts=8, gpus=4, num_layers=4, objective=objective)
    exact = solve_exactly(model_of(problem), Control(60))
    assert exact is not None
    found = solve(problem, solver="search")
    assert found.objective >= model_of(problem).objective(exact[0]) - CLOSE
    assert found.objective <= model_of(problem).objective(exact[0]) * 1.05


def test_one_layer_has_no_transitions_and_still_a_load() -> None:
    rng = np.random.default_rng(0)
    counts = RoutingCounts(
        model="one", num_experts=8, num_hidden_layers=1, layer_ids=(0,), top_k=2, num_tokens=100,
        transitions=np.zeros((0, 8, 8)), pair_transitions=np.zeros((0, 8, 8)),
        loads=rng.gamma(1.0, 10.0, (1, 8)), coactivation=np.zeros((1, 8, 8)),
    )  # fmt: skip
    problem = Problem(
        counts=counts, topology=Topology.flat(2), num_slots=8, objective=Objective(load=1.0)
    )
    assert solve(problem).status == "optimal"
