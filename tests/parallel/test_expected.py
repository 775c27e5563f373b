"""What `auto` expects of dispatchers before routing is known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from moe_runtime.measure.bench.stepped_traffic import coherent_path
from moe_runtime.parallel.expected import Affinity, ExpectedBytes
from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.traffic import RowBytes
from moe_runtime.placement.evaluate import evaluate
from moe_runtime.placement_map import Placement
from moe_runtime.trace import Trace
from tests.parallel.generating import continue_greedily, generate_with
from tests.parallel.rank_pool import RankPool
from tests.tiny_checkpoint import NUM_LAYERS, save_mixtral

NUM_TOKENS = 4000


@pytest.mark.parametrize(("num_ranks", "top_k"), [(2, 1), (4, 1), (4, 2), (4, 8)])
def test_expectations_are_what_even_routing_gives(num_ranks: int, top_k: int) -> None:
    """Law: visits and sums of drawn routing are within 3 % of the expected ones.

    4,000 tokens in 5 layers scatter by 1 %.
    """
    rng = np.random.default_rng(0)
    topk = rng.random((NUM_TOKENS, 6, 16)).argsort(2)[..., :top_k]
    placement = linear_placement(model="", num_experts=16, num_layers=6, num_ranks=num_ranks)
    plans = [ExpertPlan.of(placement, rank) for rank in range(num_ranks)]
    layers = list(coherent_path(plans, topk, np.arange(NUM_TOKENS) % num_ranks))[:-1]
    row = RowBytes.sized(model_dim=1000, item_bytes=1, top_k=top_k, weight_bytes=2)

    def expect(kv_bytes: float) -> ExpectedBytes:
        return ExpectedBytes.of(
            num_ranks=num_ranks,
            top_k=top_k,
            affinity=Affinity.even(num_ranks=num_ranks, num_experts=16, top_k=top_k),
            row=row,
            kv_bytes_per_moe_layer=kv_bytes,
        )

    off = ~np.eye(num_ranks, dtype=bool)
    visits = np.mean([layer.visits[off].sum() for layer in layers]) / NUM_TOKENS
    sums = np.mean([layer.sums.sum() for layer in layers]) / NUM_TOKENS
    moved = visits * (row.routed + 2 * top_k + 4) + sums * row.hidden
    assert expect(0).coherent == pytest.approx(moved, rel=0.03)
    assert expect(0).alltoall == pytest.approx(visits * (row.routed + row.hidden), rel=0.03)
    assert expect(10).coherent - expect(0).coherent == pytest.approx(10 * (num_ranks - 1))


def routing_that_stays(num_ranks: int, top_k: int) -> np.ndarray:
    """Of 4,000 tokens in 6 layers: nine of ten experts are where the token's first one was."""
    rng = np.random.default_rng(3)
    per_rank = 16 // num_ranks
    score = rng.random((NUM_TOKENS, 6, 16))
    home = rng.integers(0, num_ranks, NUM_TOKENS)
    for layer in range(6):
        stays = rng.random(NUM_TOKENS) < 0.9
        home = np.where(stays, home, rng.integers(0, num_ranks, NUM_TOKENS))
        is_home = np.arange(16) // per_rank == home[:, None]
        score[:, layer] += is_home * (rng.random((NUM_TOKENS, 16)) < 0.9)
    topk: np.ndarray = (-score).argsort(2)[..., :top_k]
    return topk


@pytest.mark.parametrize(("num_ranks", "top_k"), [(2, 2), (4, 2), (4, 4)])
def test_a_placement_that_keeps_tokens_in_place_is_expected_to(
    num_ranks: int, top_k: int, tmp_path: Path
) -> None:
    """Law: alltoall within 3 %, coherent never below what it moves, and above it by 10 % at most.

    By what `placement solve` writes into the file; other top-k and damage are ignored.
    """
    topk = routing_that_stays(num_ranks, top_k)
    placement = linear_placement(model="", num_experts=16, num_layers=6, num_ranks=num_ranks)
    found = evaluate(placement, [Trace.of({"topk": topk}, num_experts=16)])
    judged = {
        "top_k": top_k, "fanout": found.fanout, "crossing_fraction": found.crossing_fraction
    }  # fmt: skip
    replace(placement, made={"judged": judged}).save(tmp_path / "p.json")
    affinity = Affinity.of(Placement.load(tmp_path / "p.json"), top_k)
    assert affinity is not None
    for damage in ({"fanout": 99}, {"crossing_fraction": "0.1"}, {"top_k": 7}, {"fanout": None}):
        damaged = replace(placement, made={"judged": judged | damage})
        assert Affinity.of(damaged, top_k) is None
    assert Affinity.of(placement, top_k) is None
    plans = [ExpertPlan.of(placement, rank) for rank in range(num_ranks)]
    # A shuffle, as ranks of prompts know nothing of experts.
    origin = np.random.default_rng(0).permutation(np.arange(NUM_TOKENS) % num_ranks)
    layers = list(coherent_path(plans, topk, origin))[1:-1]
    row = RowBytes.sized(model_dim=1000, item_bytes=1, top_k=top_k, weight_bytes=2)
    expected = ExpectedBytes.of(
        num_ranks=num_ranks, top_k=top_k, affinity=affinity, row=row, kv_bytes_per_moe_layer=0
    )
    off = ~np.eye(num_ranks, dtype=bool)
    visits = np.mean([layer.visits[off].sum() for layer in layers]) / NUM_TOKENS
    sums = np.mean([layer.sums.sum() for layer in layers]) / NUM_TOKENS
    moved = visits * (row.routed + 2 * top_k + 4) + sums * row.hidden
    assert moved <= 1.02 * expected.coherent
    assert expected.coherent <= 1.1 * moved
    rank_of = topk // (16 // num_ranks)
    others = [
        len(set(line) - {home})
        for line, home in zip(rank_of[:, 2].tolist(), origin.tolist(), strict=True)
    ]
    assert expected.alltoall == pytest.approx(np.mean(others) * (row.routed + row.hidden), rel=0.03)
    assert expected.is_coherent_least


@pytest.mark.parametrize(
    ("changes", "is_coherent"),
    [
        ({"num_experts_per_tok": 1, "num_key_value_heads": 1, "head_dim": 4}, True),
        ({"num_experts_per_tok": 1}, False),
    ],
    ids=["small keys and values", "large ones"],
)
def test_auto_takes_coherent_dispatch_where_the_context_costs_less_than_the_way_back(
    pool: RankPool, tmp_path: Path, changes: dict[str, Any], is_coherent: bool
) -> None:
    folder = save_mixtral(tmp_path, **changes)
    batches = [[[5, 6, 7], [8, 9, 10]]]
    alone = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    done = pool.run(generate_with, str(folder), [batches, []], 4, {"dispatch": "auto"}, num_ranks=2)
    assert done[0]["tokens"] == continue_greedily(alone, batches, 4)
    for rank in done:
        parallel = rank["report"]["parallel"]
        least = min(parallel["expected_bytes"], key=parallel["expected_bytes"].get)
        assert (least == "coherent") is is_coherent
        assert parallel["chosen"].get("coherent", 0) == 4 * NUM_LAYERS * is_coherent
