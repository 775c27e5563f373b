"""What `auto` expects of dispatchers before routing is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from moe_runtime.measure.bench.stepped_traffic import coherent_path
from moe_runtime.parallel.expected import ExpectedBytes
from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.traffic import RowBytes
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
            num_experts=16,
            top_k=top_k,
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
