"""Counts are those of the traces, and what cannot be placed is refused with a remedy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from moe_runtime.errors import ConfigError, PlacementError
from moe_runtime.placement.objective import OBJECTIVES, Objective
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.routing_counts import RoutingCounts
from moe_runtime.placement.solve import solve
from moe_runtime.placement.topology import Topology
from moe_runtime.trace import Trace
from tests.placement.problems import make_counts, make_problem, seeds
from tests.simulate.traces import make_trace


@given(seed=seeds)
@settings(max_examples=20)
def test_counts_are_those_of_a_loop_over_tokens(seed: int) -> None:
    trace = make_trace(seed, num_tokens=80, num_experts=6, top_k=2, missing=0.2)
    found = RoutingCounts.of([trace])
    transitions = np.zeros((2, 6, 6))
    pairs = np.zeros((2, 6, 6))
    loads = np.zeros((3, 6))
    together = np.zeros((3, 6, 6))
    for token in trace.topk.tolist():
        for layer, experts in enumerate(token):
            used = [expert for expert in experts if expert >= 0]
            for expert in used:
                loads[layer, expert] += 1
                for other in used:
                    together[layer, expert, other] += expert != other
            if layer + 1 < 3:
                following = token[layer + 1]
                if experts[0] >= 0 and following[0] >= 0:
                    transitions[layer, experts[0], following[0]] += 1
                for expert in used:
                    for other in following:
                        pairs[layer, expert, other] += other >= 0
    assert np.array_equal(found.transitions, transitions)
    assert np.array_equal(found.pair_transitions, pairs)
    assert np.array_equal(found.loads, loads)
    assert np.array_equal(found.coactivation, together)


def test_a_weight_counts_a_domain_so_many_times() -> None:
    topk = np.array([[[0], [1]], [[1], [0]]])
    trace = Trace.of({"topk": topk, "domain": np.array(["code", "law"])}, num_experts=2)
    found = RoutingCounts.of([trace, trace], domain_weights={"code": 2.5})
    assert found.transitions[0].tolist() == [[0, 5], [2, 0]]
    assert found.num_tokens == 4
    with pytest.raises(PlacementError, match=r"no domain 'math' .* they have code, law"):
        RoutingCounts.of([trace], domain_weights={"math": 1})
    with pytest.raises(PlacementError, match="weight of domain 'law' is -1"):
        RoutingCounts.of([trace], domain_weights={"law": -1})


def test_too_few_tokens_are_known_as_such() -> None:
    counts = make_counts(0)
    assert replace(counts, num_tokens=399).is_scant
    assert not replace(counts, num_tokens=400).is_scant


def test_traces_of_different_models_are_refused() -> None:
    one, two = make_trace(0, num_tokens=5), make_trace(0, num_tokens=5, num_layers=4)
    with pytest.raises(PlacementError, match="different models: num_hidden_layers is 3 and 4"):
        RoutingCounts.of([one, two])
    with pytest.raises(PlacementError, match="no trace was given"):
        RoutingCounts.of([])


def test_traces_of_other_weights_are_refused() -> None:
    """Law: one digest, or unknown, in all traces; the known one goes on to the placement."""
    trace = make_trace(0, num_tokens=5)
    first, second = (replace(trace, checkpoint=digest) for digest in ("0123", "4567"))
    assert RoutingCounts.of([trace, first]).checkpoint == "0123"
    with pytest.raises(PlacementError, match=r"2 checkpoints with the same name.*0123, 4567"):
        RoutingCounts.of([trace, first, second])


def test_a_layer_without_tokens_is_refused() -> None:
    trace = Trace.of({"topk": np.array([[[0], [-1]], [[1], [-1]]])}, num_experts=2)
    with pytest.raises(PlacementError, match=r"layer 1 \(row 1\) has no routed token"):
        RoutingCounts.of([trace])


def test_layers_that_no_token_joins_are_refused() -> None:
    topk = np.array([[[0], [-1]], [[-1], [1]]])
    counts = RoutingCounts.of([Trace.of({"topk": topk}, num_experts=2)])
    with pytest.raises(PlacementError, match="first expert in both layers 0 and 1"):
        Problem(counts=counts, topology=Topology.flat(2), num_slots=2)


def test_gpus_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(PlacementError, match=r"do not divide among 3 GPUs; .* 1, 2, 4, 8; or give "
                       "--replicas 1"):  # fmt: skip
        make_problem(0, num_experts=8, gpus=3)
    with pytest.raises(PlacementError, match="7 slots cannot hold 8 experts"):
        make_problem(0, num_experts=8, gpus=1, num_slots=7)
    with pytest.raises(PlacementError, match="give at most 16 slots"):
        make_problem(0, num_experts=8, gpus=2, num_slots=18)


def test_limits_and_prices_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"balance is 0.9: .* give 1 or more"):
        make_problem(0, balance=0.9)
    with pytest.raises(PlacementError, match="move_cost needs the previous placement"):
        make_problem(0, move_cost=1.0)
    with pytest.raises(PlacementError, match="weight of fanout is -1"):
        Objective(fanout=-1)
    with pytest.raises(PlacementError, match="all weights of the objective are 0"):
        Objective()
    with pytest.raises(PlacementError, match="no objective 'speed'; there are transitions, fanout"):
        Objective.named("speed")
    assert Objective.named("mixed") == OBJECTIVES["mixed"]


def test_a_previous_placement_of_another_shape_is_refused() -> None:
    old = solve(make_problem(0, num_experts=8, gpus=4)).placement
    with pytest.raises(PlacementError, match="previous placement has gpus 4 and the problem 2"):
        make_problem(0, num_experts=8, gpus=2, previous=old)


def test_solvers_that_do_not_exist_or_do_not_fit_are_refused() -> None:
    problem = make_problem(0, num_experts=8, gpus=4)
    with pytest.raises(PlacementError, match="no solver 'magic'; there are auto, dp"):
        solve(problem, solver="magic")
    with pytest.raises(PlacementError, match="time limit is 0"):
        solve(problem, time_limit_seconds=0)
    with pytest.raises(PlacementError, match="hungarian needs as many GPUs as experts"):
        solve(problem, solver="hungarian")
    far = replace(problem, topology=Topology.of_nodes(2, 4))
    with pytest.raises(PlacementError, match="does not know a topology whose hops differ"):
        solve(far, solver="ilp")


def test_a_topology_file_is_read_as_json_and_as_yaml(tmp_path: Path) -> None:
    for name, text in (
        ("t.json", '{"rank_cost_matrix": [[0, 1.5], [2, 0]]}'),
        ("t.yaml", "rank_cost_matrix:\n- [0, 1.5]\n- [2, 0]\n"),
    ):
        (tmp_path / name).write_text(text)
        assert Topology.load(tmp_path / name).costs.tolist() == [[0, 1.5], [2, 0]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"rank_cost_matrix": [[0, 1], [1]]}', "must be square"),
        ('{"rank_cost_matrix": [[0, 1]]}', "must be square"),
        ('{"rank_cost_matrix": [[0, -1], [1, 0]]}', "GPU 0 to GPU 1 is -1.0; costs must be finite"),
        ('{"rank_cost_matrix": [[0, .nan], [1, 0]]}', "finite number"),
        ('{"rank_cost_matrix": [[0, 1], [1, 3]]}', "GPU 1 to itself is 3.0"),
        ('{"rank_cost_matrix": []}', "square"),
        ('{"costs": [[0]]}', "rank_cost_matrix"),
        ("[", "not sound YAML"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises((PlacementError, ConfigError), match=words):
        Topology.load(path)


def test_nodes_that_do_not_divide_the_gpus_are_refused() -> None:
    with pytest.raises(PlacementError, match="8 GPUs do not divide among 3 nodes"):
        Topology.of_nodes(3, 8)
    with pytest.raises(PlacementError, match="0 GPUs cannot hold experts"):
        Topology.flat(0)


def test_hops_between_nodes_cost_more() -> None:
    costs = Topology.of_nodes(2, 4, intra=1.0, inter=3.0).costs
    assert costs.tolist() == [[0, 1, 3, 3], [1, 0, 3, 3], [3, 3, 0, 1], [3, 3, 1, 0]]
    assert not Topology.of_nodes(2, 4).is_flat
    assert Topology.flat(4).is_flat
