"""Figures of a placement are those of a token-by-token walk."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import PlacementError
from moe_runtime.placement.baselines import eplb, linear, random, round_robin
from moe_runtime.placement.evaluate import BATCH_TOKENS, evaluate
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.topology import Topology
from moe_runtime.placement_map import Placement
from moe_runtime.trace import Trace
from tests.placement.problems import seeds
from tests.simulate.traces import make_trace

Array = np.ndarray[Any, Any]


def walk(placement: Placement, trace: Trace, costs: Array) -> dict[str, float]:
    """Every token on its own, every choice spelled out."""
    L, G = placement.num_layers, placement.gpus
    hosts = placement.hosts()
    node = np.arange(G) // (G // placement.nodes)
    crossings = transitions = between = reached = visits = local = waiting = 0
    cost = 0.0
    load = np.zeros((L, G))
    for row, token in enumerate(trace.topk.tolist()):
        at = None
        for layer, experts in enumerate(token):
            chosen = []
            for expert in experts:
                if expert < 0:
                    chosen.append(None)
                    continue
                places = np.flatnonzero(hosts[layer, :, expert])
                price = np.zeros(len(places)) if at is None else costs[at, places]
                order = np.argsort(price, kind="stable")
                nearest = [int(places[i]) for i in order if price[i] == price.min()]
                chosen.append(nearest[row % len(nearest)])
            used = [gpu for gpu in chosen if gpu is not None]
            visits += bool(used)
            reached += len(set(used))
            for gpu in used:
                load[layer, gpu] += 1
                waiting += at is not None
                local += gpu == at
            if at is not None and chosen[0] is not None:
                transitions += 1
                crossings += chosen[0] != at
                between += node[chosen[0]] != node[at]
                cost += costs[at, chosen[0]]
            at = chosen[0]
    busy = load[load.sum(axis=1) > 0]
    return {
        "crossings_per_token": crossings / trace.num_tokens,
        "crossing_fraction": crossings / max(transitions, 1),
        "inter_node_fraction": between / max(transitions, 1),
        "cost_per_transition": cost / max(transitions, 1),
        "fanout": reached / visits,
        "load_max_over_mean": float((busy.max(axis=1) / busy.mean(axis=1)).mean()),
        "local_activation_rate": local / max(waiting, 1),
    }


def random_placement(
    trace: Trace, seed: int, gpus: int, nodes: int, extra: int, *, may_repeat: bool
) -> Placement:
    rng = np.random.default_rng(seed)
    L, E = trace.num_layers, trace.num_experts
    slots = np.empty((L, E + extra), np.int64)
    for layer in range(L):
        slots[layer] = rng.permutation(
            np.concatenate([np.arange(E), rng.choice(E, extra, replace=may_repeat)])
        )
    return Placement(
        model="unknown", num_experts=E, num_hidden_layers=trace.num_hidden_layers,
        layer_ids=trace.layer_ids, gpus=gpus, nodes=nodes, slots=slots,
    )  # fmt: skip


@given(
    seed=seeds,
    missing=st.sampled_from([0.0, 0.3]),
    extra=st.sampled_from([0, 4, 8]),
    nodes=st.sampled_from([1, 2]),
)
@settings(max_examples=40)
def test_figures_are_those_of_a_walk(seed: int, missing: float, extra: int, nodes: int) -> None:
    trace = make_trace(seed, num_tokens=40, num_experts=8, top_k=3, missing=missing)
    placement = random_placement(trace, seed, 4, nodes, extra, may_repeat=True)
    topology = Topology.of_nodes(nodes, 4, intra=1.0, inter=3.0)
    found = evaluate(placement, [trace], topology)
    for name, value in walk(placement, trace, topology.costs).items():
        assert getattr(found, name) == pytest.approx(value), name
    assert found.imbalance_ratio == pytest.approx(found.load_max_over_mean - 1)
    assert found.num_tokens == 40


def test_a_batch_is_256_rows_and_a_rest_counts_only_alone() -> None:
    topk = np.zeros((2 * BATCH_TOKENS + 10, 1, 1), np.int64)
    topk[:BATCH_TOKENS:2] = 1  # the first batch is even, the second all on one GPU
    trace = Trace.of({"topk": topk}, num_experts=2)
    counts = RoutingCounts.of([trace])
    assert evaluate(linear(counts, 2), [trace]).load_max_over_mean_256 == pytest.approx(1.5)
    rest = trace.select(np.arange(2 * BATCH_TOKENS, 2 * BATCH_TOKENS + 10))
    assert evaluate(linear(counts, 2), [rest]).load_max_over_mean_256 == pytest.approx(2.0)


def test_domains_have_figures_of_their_own() -> None:
    topk = np.array([[[0], [0]], [[0], [2]], [[1], [1]], [[3], [0]]])
    trace = Trace.of({"topk": topk, "domain": np.array(["a", "a", "b", ""])}, num_experts=4)
    found = evaluate(linear(RoutingCounts.of([trace]), 2), [trace])
    assert found.crossing_fraction == 0.5
    assert {name: d.crossing_fraction for name, d in found.per_domain.items()} == {"a": 0.5, "b": 0}
    assert found.per_layer[0].crossing_fraction == 0
    assert found.per_layer[1].crossing_fraction == 0.5
    assert found.per_layer[1].gpu_load == (3, 1)
    assert found.traffic.tolist() == [[2, 1], [1, 0]]


@given(seed=seeds)
@settings(max_examples=10)
def test_names_of_gpus_change_no_figure(seed: int) -> None:
    """Without replicas; with them, equally near ones are taken in the order of names."""
    trace = make_trace(seed, num_tokens=60, num_experts=8)
    placement = random_placement(trace, seed, 4, 1, 0, may_repeat=False)
    names = np.random.default_rng(seed).permutation(4)
    renamed = Placement(
        model="unknown", num_experts=8, num_hidden_layers=trace.num_hidden_layers,
        layer_ids=trace.layer_ids, gpus=4, nodes=1,
        slots=placement.by_gpu()[:, names].reshape(trace.num_layers, -1),
    )  # fmt: skip
    one, two = evaluate(placement, [trace]), evaluate(renamed, [trace])
    for name in ("crossing_fraction", "fanout", "load_max_over_mean", "load_max_over_mean_256"):
        assert getattr(one, name) == pytest.approx(getattr(two, name))


def test_the_objective_is_what_evaluate_counts() -> None:
    trace = make_trace(1, num_tokens=200, num_experts=8)
    counts = RoutingCounts.of([trace])
    placement = random(counts, 4, seed=3)
    gpu = placement.gpu_of()
    crossings = sum(
        (flow * (gpu[i][:, None] != gpu[i + 1][None, :])).sum()
        for i, flow in enumerate(counts.transitions)
    )
    expected = crossings / counts.transitions.sum()
    assert evaluate(placement, [trace]).crossing_fraction == pytest.approx(expected)


def test_baselines_hold_every_expert_once() -> None:
    counts = RoutingCounts.of([make_trace(0, num_tokens=100, num_experts=8)])
    assert linear(counts, 4).slots[0].tolist() == list(range(8))
    assert round_robin(counts, 4).slots[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert round_robin(counts, 4).gpu_of()[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    balanced = eplb(counts, 4, num_slots=12)
    assert balanced.num_slots == 12


def test_what_does_not_fit_is_refused() -> None:
    trace = make_trace(0, num_tokens=20, num_experts=8)
    placement = linear(RoutingCounts.of([trace]), 4)
    with pytest.raises(PlacementError, match="at least one"):
        evaluate(placement, [])
    with pytest.raises(PlacementError, match="topology has 2 GPUs and the placement 4"):
        evaluate(placement, [trace], Topology.flat(2))
    with pytest.raises(PlacementError, match="num_experts 8 and the trace 9"):
        evaluate(placement, [make_trace(0, num_tokens=20, num_experts=9)])
