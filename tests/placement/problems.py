"""Random placement problems, and the slow and obvious way to price and to solve them."""

from collections.abc import Iterator
from itertools import permutations, product
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moe_runtime.placement.cost_model import CostModel, to_placement
from moe_runtime.placement.objective import Objective
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.topology import Topology
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]


def make_counts(
    seed: int, *, num_layers: int = 3, num_experts: int = 4, planted: float = 0.0
) -> RoutingCounts:
    """Uneven counts; `planted` of the transitions stay in one of E / 4 hidden groups."""
    rng = np.random.default_rng(seed)
    L, E = num_layers, num_experts
    group = np.stack([rng.permutation(E) for _ in range(L)]) // 4
    transitions = np.round(rng.gamma(0.5, 100.0, (L - 1, E, E)) * (1 - planted)) + 1
    for layer in range(L - 1):
        same = group[layer][:, None] == group[layer + 1][None, :]
        transitions[layer] += np.round(planted * 400 * same)
    half = np.triu(np.round(rng.gamma(0.5, 50.0, (L, E, E))), 1)
    return RoutingCounts(
        model="random",
        num_experts=E,
        num_hidden_layers=L,
        layer_ids=tuple(range(L)),
        top_k=2,
        num_tokens=int(transitions[0].sum()),
        transitions=transitions,
        pair_transitions=transitions * 4,
        loads=np.round(rng.gamma(1.0, 100.0, (L, E))) + 1,
        coactivation=half + half.transpose(0, 2, 1),
    )


def make_problem(
    seed: int,
    *,
    gpus: int = 2,
    nodes: int = 1,
    objective: Objective | None = None,
    num_slots: int | None = None,
    balance: float | None = None,
    previous: Placement | None = None,
    move_cost: float = 0.0,
    **shape: Any,
) -> Problem:
    counts = make_counts(seed, **shape)
    return Problem(
        counts=counts,
        topology=Topology.of_nodes(nodes, gpus),
        num_slots=num_slots or counts.num_experts,
        objective=objective or Objective(transitions=1.0),
        balance=balance,
        previous=previous,
        move_cost=move_cost,
    )


def every_layer(num_experts: int, gpus: int) -> list[Array]:
    """All ways to put a layer's experts on GPUs, equally many each."""
    places = np.arange(num_experts) // (num_experts // gpus)
    return [np.array(way) for way in sorted(set(permutations(places.tolist())))]


def every_assignment(problem: Problem) -> Iterator[Array]:
    ways = every_layer(problem.counts.num_experts, problem.gpus)
    for layers in product(ways, repeat=problem.counts.num_layers):
        yield np.stack(layers)


def price(problem: Problem, gpu: Array) -> float:
    """The objective of an assignment `[L, E]`, by loops over experts; inf above the load limit."""
    counts, costs, weights = problem.counts, problem.topology.costs, problem.objective
    L, E, G = counts.num_layers, counts.num_experts, problem.gpus
    hops = sum(
        counts.transitions[layer, i, j] * costs[gpu[layer, i], gpu[layer + 1, j]]
        for layer in range(L - 1)
        for i in range(E)
        for j in range(E)
    )
    total = weights.transitions * hops / counts.transitions.sum()
    for layer in range(L):
        tokens = counts.loads[layer].sum() / counts.top_k
        split = sum(
            counts.coactivation[layer, i, j]
            for i in range(E)
            for j in range(i)
            if gpu[layer, i] != gpu[layer, j]
        )
        total += weights.fanout * 2 / counts.top_k * split / tokens / L
        loads = [counts.loads[layer][gpu[layer] == g].sum() for g in range(G)]
        ratios = np.array(loads) / np.mean(loads)
        total += weights.load * (np.maximum(ratios - 1, 0) ** 2).sum() / L
        if problem.balance is not None and ratios.max() > problem.balance + 1e-9:
            return float("inf")
    if problem.previous is not None:
        hosts = problem.previous.hosts()
        moved = sum(not hosts[layer, gpu[layer, e], e] for layer in range(L) for e in range(E))
        total += problem.move_cost * moved / (L - 1)
    return float(total)


def model_of(problem: Problem) -> CostModel:
    """The cost model without replicas, items being experts in order."""
    counts = problem.counts
    items = np.tile(np.arange(counts.num_experts), (counts.num_layers, 1))
    return CostModel.of(problem, items)


def placement_of(problem: Problem, gpu: Array) -> Placement:
    return to_placement(problem, model_of(problem).expert, gpu, {})


objectives = st.sampled_from(
    [
        Objective(transitions=1.0),
        Objective(fanout=1.0),
        Objective(transitions=0.5, fanout=1.0, load=0.3),
        Objective(transitions=1.0, load=0.2),
    ]
)
seeds = st.integers(0, 2**31 - 1)
