"""Formulas of dispatchers that step decoder layers, beside the ledger and torch itself."""

import numpy as np

from moe_runtime.measure.bench.stepped_traffic import coherent_path
from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.traffic import RowBytes, coherent_bytes, context_bytes, shuffled_bytes
from moe_runtime.placement.cocluster import DeviceTables, device_tables
from moe_runtime.placement_map import Placement
from moe_runtime.predictors.token_expert_counts import token_expert_counts
from moe_runtime.trace import Trace
from tests.parallel.exchanging import count_stepped
from tests.parallel.rank_pool import RankPool

NUM_EXPERTS, NUM_LAYERS, NUM_TOKENS, NUM_IDS = 8, 3, 90, 12


def routing() -> tuple[np.ndarray, np.ndarray]:
    """Ids, and experts that mostly follow from them."""
    rng = np.random.default_rng(1)
    token_id = rng.integers(0, NUM_IDS, NUM_TOKENS).astype(np.int32)
    liking = rng.random((NUM_IDS, NUM_LAYERS, NUM_EXPERTS)) * 3
    score = liking[token_id] + rng.random((NUM_TOKENS, NUM_LAYERS, NUM_EXPERTS))
    return token_id, (-score).argsort(2)[..., :2].astype(np.uint8)


def tables_of(placement: Placement) -> DeviceTables:
    token_id, topk = routing()
    fields = {
        "topk": topk,
        "token_id": token_id,
        "sequence_id": np.zeros(NUM_TOKENS, np.int32),
        "model": np.array("toy"),
    }
    trace = Trace.of(fields, num_experts=NUM_EXPERTS)
    counts = token_expert_counts([trace])
    assert counts is not None
    return device_tables(placement, counts, [trace])


def test_counted_bytes_are_those_of_formulas_and_of_torch(pool: RankPool) -> None:
    """Law: exact for coherent and for both kinds of shared attention, whatever the routing."""
    token_id, topk = routing()
    token_id = np.where(np.arange(NUM_TOKENS) % 7, token_id, NUM_IDS + 5)  # unseen ones
    placement = linear_placement(
        model="", num_experts=NUM_EXPERTS, num_layers=NUM_LAYERS, num_ranks=4
    )
    tables = tables_of(placement)
    assert np.isfinite(tables.token_confidence).all()
    done = pool.run(count_stepped, topk, placement, tables, token_id, num_ranks=4)
    for rows, counted, by_torch in done:
        assert counted == by_torch > 0
        assert len(rows) == 2 * 3
        for row in rows:
            assert row.counted_bytes == row.counted_formula_bytes > 0, row
    rows = {(row.tokens_per_rank, row.dispatcher): row for row in done[0][0]}
    off, on = rows[3, "tensor attention, alltoall"], rows[3, "tensor attention, speculative"]
    assert on.moe_bytes_per_token_layer < off.moe_bytes_per_token_layer
    assert on.local_activation_rate["seen"] > on.local_activation_rate["unseen"]


def test_replicas_are_counted_as_they_are_chosen(pool: RankPool) -> None:
    """Law: among replicas tokens take turns by where they stand, which the formula follows."""
    token_id, topk = routing()
    rng = np.random.default_rng(5)
    share = rng.permuted(np.tile(np.arange(NUM_EXPERTS), (NUM_LAYERS, 1)), axis=1)
    share = share.reshape(NUM_LAYERS, 4, 2)
    slots = np.concatenate([share, np.roll(share, 1, axis=1), np.roll(share, 2, axis=1)], axis=2)
    placement = Placement(
        model="",
        num_experts=NUM_EXPERTS,
        num_hidden_layers=NUM_LAYERS,
        layer_ids=tuple(range(NUM_LAYERS)),
        gpus=4,
        nodes=2,
        slots=slots.reshape(NUM_LAYERS, -1),
    )
    plain = linear_placement(model="", num_experts=NUM_EXPERTS, num_layers=NUM_LAYERS, num_ranks=4)
    for rows, counted, by_torch in pool.run(
        count_stepped, topk, placement, tables_of(plain), token_id, num_ranks=4
    ):
        assert counted == by_torch
        assert all(row.counted_bytes == row.counted_formula_bytes for row in rows)


def test_a_token_stays_with_its_first_expert_and_goes_home_behind_the_last_layer() -> None:
    """Law, by hand: 2 ranks of 2 experts, one token of rank 0, 3 layers, top-2."""
    placement = linear_placement(model="", num_experts=4, num_layers=3, num_ranks=2)
    plans = [ExpertPlan.of(placement, rank) for rank in range(2)]
    topk = np.array([[[2, 0], [3, 2], [2, 3]]])
    first, second, third = coherent_path(plans, topk, np.array([0]))
    assert first.tokens.tolist() == [1, 0]
    assert first.visits.tolist() == [[1, 1], [0, 0]]  # its second expert is where it was
    assert first.sums.tolist() == [[0, 1], [0, 0]]  # and its sum follows the token
    assert second.tokens.tolist() == [0, 1]
    assert second.visits.tolist() == [[0, 0], [0, 1]]  # nothing moves
    assert not second.sums.any()
    assert third.visits.tolist() == [[0, 0], [1, 1]]  # it stays for its experts and goes home
    assert third.sums.tolist() == [[0, 0], [1, 0]]


def test_bytes_by_hand() -> None:
    """Law: what the formulas count, with sizes that are easy to add."""
    row = RowBytes.sized(model_dim=10, item_bytes=4, top_k=2, weight_bytes=4)  # 40, routed 52
    visits, sums = np.array([[5, 1], [2, 0]]), np.array([[0, 3], [0, 0]])
    # 52 + 2 ranks of 2 bytes + a number of 4; two kinds of counts for 2 ranks of 4 bytes.
    assert coherent_bytes(visits, sums, row, 2).tolist() == [
        [0, 60 + 3 * 40 + 16],
        [2 * 60 + 16, 0],
    ]
    assert context_bytes(np.array([3, 0]), 20).tolist() == [[0, 3 * 24], [0, 0]]
    # Addends for the tokens of rank 1, then the rows of rank 0.
    assert shuffled_bytes(np.array([2, 5]), row, shows_path=True).tolist() == [
        [0, 5 * 40 + 2 * 42],
        [2 * 40 + 5 * 42, 0],
    ]
