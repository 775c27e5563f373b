"""Dispatchers on gloo ranks: what was computed, and what was sent for it."""

from typing import Any

import numpy as np
import pytest
import torch

from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.traffic import RowBytes, allreduce_bytes, alltoall_bytes, auto_bytes
from moe_runtime.placement_map import Placement
from tests.parallel.exchanging import KINDS, Case, compute, count_traffic, exchange
from tests.parallel.rank_pool import RankPool

NUM_EXPERTS = 8


def replicated(num_ranks: int, nodes: int) -> Placement:
    """Each rank holds its share, in an order of chance, and an expert of another rank."""
    rng = np.random.default_rng(3)
    share = rng.permuted(np.tile(np.arange(NUM_EXPERTS), (2, 1)), axis=1)
    share = share.reshape(2, num_ranks, -1)
    extra = np.roll(share[..., :1], 1, axis=1)
    return Placement(
        model="",
        num_experts=NUM_EXPERTS,
        num_hidden_layers=2,
        layer_ids=(0, 1),
        gpus=num_ranks,
        nodes=nodes,
        slots=np.concatenate([share, extra], axis=2).reshape(2, -1),
    )


def linear(num_ranks: int, nodes: int = 1) -> Placement:
    return linear_placement(
        model="", num_experts=NUM_EXPERTS, num_layers=2, num_ranks=num_ranks, num_nodes=nodes
    )


CASES = {
    "2 ranks": Case(placement=linear(2), tokens=(5, 3), top_k=2, dtype=torch.float32),
    "2 ranks, one idle": Case(placement=linear(2), tokens=(0, 4), top_k=3, dtype=torch.float32),
    "4 ranks": Case(placement=linear(4), tokens=(1, 7, 2, 4), top_k=3, dtype=torch.float64),
    "4 ranks, two idle": Case(
        placement=linear(4), tokens=(0, 1, 0, 1), top_k=1, dtype=torch.bfloat16
    ),
    "4 ranks, all experts": Case(
        placement=linear(4), tokens=(3, 3, 3, 3), top_k=NUM_EXPERTS, dtype=torch.float32
    ),
    "4 ranks of 2 nodes, replicas": Case(
        placement=replicated(4, 2), tokens=(6, 0, 5, 9), top_k=2, dtype=torch.float32
    ),
    "4 ranks of 2 nodes, one idle": Case(
        placement=linear(4, nodes=2), tokens=(4, 6, 0, 5), top_k=4, dtype=torch.float32
    ),
    "2 ranks, replicas": Case(
        placement=replicated(2, 1), tokens=(6, 11), top_k=4, dtype=torch.float32
    ),
}


@pytest.fixture(scope="module", params=[(kind, name) for kind in KINDS for name in CASES], ids=str)
def done(pool: RankPool, request: pytest.FixtureRequest) -> tuple[str, Case, list[dict[str, Any]]]:
    kind, name = request.param
    case = CASES[name]
    return kind, case, pool.run(exchange, kind, case, num_ranks=len(case.tokens))


def test_every_token_gets_all_its_experts_once(
    done: tuple[str, Case, list[dict[str, Any]]],
) -> None:
    """Law: outputs equal those of one process, to the bit where no sum rounds."""
    _, case, found = done
    every = set(range(NUM_EXPERTS))
    for rank, one in enumerate(found):
        for layer, output in enumerate(one["outputs"]):
            expected = compute(case.rows(layer, rank), every, NUM_EXPERTS)
            assert output == expected.tolist(), (rank, layer)


def test_the_ledger_counts_what_torch_is_given(
    done: tuple[str, Case, list[dict[str, Any]]],
) -> None:
    """Law: bytes, messages and calls are torch.distributed's, and no other collective runs."""
    for one in done[2]:
        lines = one["sent"].values()
        num_ranks = len(done[2])
        assert [sum(line.num_bytes[g] for line in lines) for g in range(num_ranks)] == one[
            "torch_bytes"
        ]
        assert [sum(line.messages[g] for line in lines) for g in range(num_ranks)] == one[
            "torch_messages"
        ]
        assert sum(one["calls"].values()) == one["torch_calls"]


def test_bytes_are_those_of_the_formula(done: tuple[str, Case, list[dict[str, Any]]]) -> None:
    """Law: predicted equals counted exactly, for each pair of ranks and layer."""
    kind, case, found = done
    rows = case.rows(0, int(np.argmax(case.tokens)))
    size = rows.row_bytes()
    chosen = dict(found[0]["chosen"] or {})
    for layer in range(case.placement.num_layers):
        visits = np.array([one["visits"][layer] for one in found])
        counted = np.array([one["sent"][layer].num_bytes for one in found])
        predicted = np.array([one["sent"][layer].predicted_bytes for one in found])
        assert (counted == predicted).all()
        alltoall = alltoall_bytes(visits, size)
        allreduce = allreduce_bytes(np.array(case.tokens), size)
        if kind == "auto":
            uncounted = alltoall - auto_bytes(len(found)) // len(found)
            best = min(uncounted.sum(), allreduce.sum())
            assert counted.sum() == best + auto_bytes(len(found)).sum()
            chosen["allreduce" if allreduce.sum() <= uncounted.sum() else "alltoall"] -= 1
        elif kind == "hierarchical":
            assert_far_bytes(case, layer, counted, size)
            assert case.placement.nodes > 1 or (counted == alltoall).all()
        else:
            assert (counted == (alltoall if kind == "alltoall" else allreduce)).all()
    assert not any(chosen.values()), "what was chosen is what moves fewer bytes"


def assert_far_bytes(case: Case, layer: int, counted: np.ndarray[Any, Any], size: RowBytes) -> None:
    """Between nodes: one row there and one back for each (token, other node), among peers alone."""
    num_ranks = len(case.tokens)
    node, place = np.divmod(np.arange(num_ranks), num_ranks // case.placement.nodes)
    rows = np.zeros((num_ranks, num_ranks), int)
    for rank in range(num_ranks):
        index = case.rows(layer, rank).index
        owners = ExpertPlan.of(case.placement, rank).nearest.owners(layer, index, rank)
        for ranks in owners.tolist():
            for other in {node[g] for g in ranks} - {node[rank]}:
                rows[rank, (node == other) & (place == place[rank])] += 1
    is_far = node[:, None] != node
    expected = rows * size.routed + rows.T * size.hidden + 4 * (place[:, None] == place)
    assert (counted[is_far] == expected[is_far]).all()


def test_one_copy_travels_to_a_rank_however_many_experts_are_there() -> None:
    """Law, by hand: 2 ranks, a token with both its experts on the other rank is one row."""
    size = RowBytes.sized(model_dim=10, item_bytes=4, top_k=2, weight_bytes=4)
    assert (size.hidden, size.routed) == (40, 40 + 2 * (4 + 2))
    moved = alltoall_bytes(np.array([[3, 1], [0, 5]]), size)
    assert moved.tolist() == [[0, 52 + 4], [40 + 4, 0]]


@pytest.mark.parametrize(("payload", "row_bytes"), [("bfloat16", 6 * 2), ("int8", 6 + 4)])
@pytest.mark.parametrize("kind", ["alltoall", "auto", "hierarchical"])
def test_a_rounded_payload_moves_its_bytes(
    pool: RankPool, kind: str, payload: str, row_bytes: int
) -> None:
    """Law: as many rows, each of its size; counted is predicted; outputs are near by, not equal."""
    case = CASES["4 ranks of 2 nodes, replicas"]
    exact = pool.run(exchange, kind, case, num_ranks=4)
    found = pool.run(exchange, kind, case, payload, num_ranks=4)
    for one, other in zip(found, exact, strict=True):
        assert one["calls"] == other["calls"]
        for layer, line in one["sent"].items():
            assert line.num_bytes == line.predicted_bytes
            assert line.messages == other["sent"][layer].messages
            fewer = np.array(other["sent"][layer].num_bytes) - line.num_bytes
            assert (fewer % (6 * 4 - row_bytes) == 0).all()
            assert fewer.sum() > 0
        for mine, theirs in zip(one["outputs"], other["outputs"], strict=True):
            # Sums of up to 2 x 36 x 0.75, each of them rounded to 1 / 127 of its row's largest.
            np.testing.assert_allclose(mine, theirs, atol=2.0)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_benchmark_counts_what_its_formulas_say(pool: RankPool, nodes: int) -> None:
    rng = np.random.default_rng(1)
    topk = rng.random((90, 3, NUM_EXPERTS)).argsort(2)[..., :2].astype(np.int16)
    placement = linear_placement(
        model="", num_experts=NUM_EXPERTS, num_layers=3, num_ranks=4, num_nodes=nodes
    )
    rows = pool.run(count_traffic, topk, placement, num_ranks=4)[0]
    ours = [row for row in rows if row.counted_bytes is not None]
    assert len(ours) == 2 * (3 + nodes)
    assert all(row.counted_bytes == row.counted_formula_bytes for row in ours)
    by_name = {(row.tokens_per_rank, row.dispatcher): row for row in rows}
    if nodes > 1:
        far = by_name[3, "hierarchical"].bytes_between_nodes
        assert 0 < far < by_name[3, "alltoall"].bytes_between_nodes
    assert by_name[3, "alltoall"].ratio < by_name[3, "alltoall, a row each pair"].ratio == 1
