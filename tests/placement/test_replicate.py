"""EPLB is reproduced; our replicas are never worse balanced, and never twice on a GPU."""

from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import PlacementError
from moe_runtime.placement.check import check
from moe_runtime.placement.cost_model import CostModel
from moe_runtime.placement.eplb import eplb_slots
from moe_runtime.placement.packing import first_packing, least_load
from moe_runtime.placement.rename import rename
from moe_runtime.placement.replicate import busiest_over_mean, replicate
from moe_runtime.placement.solve import solve
from tests.placement.problems import make_problem, seeds

Array = np.ndarray[Any, Any]

# EPLB's README, which other engines' tests hold too.
EVEN = 1e-6  # of the mean load: layers as even as this are not improved further
README_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_eplb_gives_the_slots_of_its_readme() -> None:
    slots = eplb_slots(np.array(README_LOADS), num_slots=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert slots.tolist() == README_SLOTS


def test_eplb_is_global_where_groups_do_not_divide_among_nodes() -> None:
    """Then groups and nodes are left out of account."""
    loads = np.array(README_LOADS)
    some = eplb_slots(loads, num_slots=16, num_groups=3, num_nodes=2, num_gpus=8)
    none = eplb_slots(loads, num_slots=16, num_groups=1, num_nodes=1, num_gpus=8)
    assert some.tolist() == none.tolist()


def test_eplb_refuses_what_does_not_divide() -> None:
    with pytest.raises(PlacementError, match="slots among GPUs equally, and 15 / 8"):
        eplb_slots(np.array(README_LOADS), num_slots=15, num_groups=1, num_nodes=1, num_gpus=8)


def random_loads(rng: np.random.Generator, num_experts: int) -> Array:
    if rng.random() < 0.3:
        return rng.zipf(1.5, (2, num_experts)).clip(max=10_000).astype(np.float64)
    return rng.random((2, num_experts)) ** rng.choice([1, 2, 4, 8]) * 1000 + 1e-3


def test_our_busiest_gpu_is_never_above_eplbs_on_200_random_instances() -> None:
    """In no layer of any of them."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        num_experts = int(rng.choice([8, 12, 16, 32]))
        gpus = int(rng.choice([g for g in (2, 4, 8, 16) if g <= num_experts]))
        per_gpu = min(-(-num_experts // gpus) + int(rng.integers(0, 3)), num_experts)
        num_slots = per_gpu * gpus
        loads = random_loads(rng, num_experts)
        nodes = int(rng.choice([1, 2]))
        groups = int(rng.choice([1, 2, 4]))
        if num_experts % groups or gpus % nodes:
            groups = nodes = 1
        theirs = eplb_slots(
            loads, num_slots=num_slots, num_groups=groups, num_nodes=nodes, num_gpus=gpus
        )
        rank = np.broadcast_to(np.arange(num_slots) // per_gpu, theirs.shape)
        expert, gpu = replicate(loads, num_slots, gpus)
        ours = busiest_over_mean(loads, expert, gpu, gpus)
        assert (ours <= busiest_over_mean(loads, theirs, rank, gpus) + EVEN).all()
        for layer in range(2):
            held = set(zip(expert[layer].tolist(), gpu[layer].tolist(), strict=True))
            assert len(held) == num_slots
            assert (np.bincount(gpu[layer], minlength=gpus) == per_gpu).all()
            assert set(expert[layer].tolist()) == set(range(num_experts))


def least_of_all_packings(load_E: Array, num_slots: int, gpus: int) -> float:
    """The smallest busiest load of all ways to hold every expert, none twice on a GPU."""
    sets = list(combinations(range(len(load_E)), num_slots // gpus))
    best = np.inf
    for held in combinations_with_replacement(sets, gpus):
        count_E = np.bincount(np.concatenate(held), minlength=len(load_E))
        if count_E.all():
            share_E = load_E / count_E
            best = min(best, max(share_E[list(mine)].sum() for mine in held))
    return float(best)


def test_where_eplb_is_more_even_it_holds_an_expert_twice_on_a_gpu() -> None:
    """An uneven split that no packing without duplicates has; ours is then the best without."""
    loads = np.array([[10.0, 9.0, 1.0]])
    theirs = eplb_slots(loads, num_slots=4, num_groups=1, num_nodes=1, num_gpus=2)
    assert sorted(map(sorted, theirs.reshape(2, 2).tolist())) == [[0, 0], [1, 2]]
    rank = np.array([[0, 0, 1, 1]])
    assert busiest_over_mean(loads, theirs, rank, 2)[0] == 1.0
    expert, gpu = replicate(loads, 4, 2)
    ours = busiest_over_mean(loads, expert, gpu, 2)[0]
    assert ours == pytest.approx(least_of_all_packings(loads[0], 4, 2) / 10)
    assert ours == pytest.approx(1.05)


SMALL_SHAPES = [(4, 2, 4), (4, 2, 6), (3, 3, 6), (5, 3, 6), (4, 3, 9), (5, 2, 8), (4, 4, 8)]


@given(seed=seeds, shape=st.sampled_from(SMALL_SHAPES))
@settings(max_examples=60)
def test_no_packing_is_below_the_least_load(seed: int, shape: tuple[int, int, int]) -> None:
    """Sound beside all packings of tiny layers; ours is one of them."""
    experts, gpus, slots = shape
    load_E = random_loads(np.random.default_rng(seed), experts)[0]
    best = least_of_all_packings(load_E, slots, gpus)
    assert load_E.sum() / gpus * (1 - EVEN) <= least_load(load_E, slots, gpus) <= best * (1 + EVEN)
    expert, gpu = replicate(load_E[None], slots, gpus)
    ours = busiest_over_mean(load_E[None], expert, gpu, gpus)[0] * load_E.sum() / gpus
    assert ours >= best * (1 - EVEN)


def test_the_least_load_is_met_where_one_expert_decides() -> None:
    """One expert too heavy for a GPU on its own: the bound is its share beside the lightest."""
    load_E = np.array([100.0, 1.0, 1.0, 1.0])
    assert least_load(load_E, 4, 2) == pytest.approx(101.0)
    assert least_of_all_packings(load_E, 4, 2) == 101.0


@given(
    seed=seeds,
    shape=st.sampled_from([(4, 4, 8), (4, 4, 16), (5, 5, 20), (6, 3, 9), (3, 4, 8), (8, 2, 16)]),
)
@settings(max_examples=60)
def test_every_count_of_replicas_finds_room(seed: int, shape: tuple[int, int, int]) -> None:
    """Up to every expert on every GPU, and with counts as uneven as they can be."""
    experts, gpus, slots = shape
    rng = np.random.default_rng(seed)
    count = np.ones(experts, np.int64)
    while count.sum() < slots:
        free = np.flatnonzero(count < gpus)
        count[rng.choice(free)] += 1
    holds = first_packing(rng.random(experts), count, gpus)
    assert (holds.sum(axis=0) == count).all()
    assert (holds.sum(axis=1) == slots // gpus).all()


def test_affinity_finds_better_places_for_replicas_than_loads_do() -> None:
    problem = make_problem(0, num_experts=16, gpus=4, num_slots=24, num_layers=4, planted=0.5)
    loads_only = solve(problem, solver="eplb")
    both = solve(problem, solver="search")
    assert both.objective < loads_only.objective
    check(both.placement, problem)


def test_replicas_save_hops() -> None:
    """The objective with replicas is what a walk over all choices of replicas costs."""
    problem = make_problem(0, num_experts=4, gpus=4, num_slots=8, num_layers=2)
    expert, gpu = replicate(problem.counts.loads, 8, 4)
    model = CostModel.of(problem, expert)
    flow = problem.counts.transitions[0]
    hops = 0.0
    for i in range(4):
        places = gpu[0][expert[0] == i]
        for place in places:
            hops += sum(
                flow[i, j] / len(places) for j in range(4) if place not in gpu[1][expert[1] == j]
            )
    assert model.objective(gpu) == pytest.approx(hops / flow.sum())


def test_the_balance_alone_moves_no_more_than_it_must() -> None:
    """The same answer under other names is no move at all."""
    problem = make_problem(3, num_experts=16, gpus=4, num_slots=20, num_layers=3)
    first = solve(problem, solver="eplb").placement
    again = make_problem(3, num_experts=16, gpus=4, num_slots=20, num_layers=3, previous=first)
    assert (solve(again, solver="eplb").placement.hosts() == first.hosts()).all()


@given(seed=seeds, by_layer=st.booleans())
@settings(max_examples=20)
def test_renaming_finds_the_old_names(seed: int, by_layer: bool) -> None:
    rng = np.random.default_rng(seed)
    expert = np.tile(np.arange(8), (3, 1))
    gpu = np.stack([rng.permutation(8) % 4 for _ in range(3)])
    hosts = np.zeros((3, 4, 8), np.bool_)
    for layer in range(3):
        hosts[layer, gpu[layer], np.arange(8)] = True
    names = rng.permutation(4)
    assert (rename(names[gpu], expert, hosts, by_layer=by_layer) == gpu).all()
