"""Ranks that all have the same tokens: both ways give the sum, and each moves what it should."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from moe_runtime.parallel.alltoall import Visits
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.shared_batch import SharedBatch
from moe_runtime.parallel.traffic import (
    auto_bytes,
    shared_slices_bytes,
    shared_sums_bytes,
    transformers_all_reduce_bytes,
)
from tests.parallel.exchanging import Case, compute, recorded
from tests.parallel.rank_pool import RankPool

NUM_EXPERTS = 8


def share_tokens(mesh: DeviceMesh, case: Case) -> dict[str, Any]:
    """One layer over the tokens of rank 0 of `case`."""
    rank = mesh.get_local_rank()
    ledger = Ledger(mesh.get_group())
    plan = ExpertPlan.of(case.placement, rank)
    shared = SharedBatch(plan, ledger)
    held = set(np.flatnonzero(plan.held[0]).tolist())

    def experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return compute(Rows(hidden, index, weights), held, NUM_EXPERTS)

    with recorded(rank, ledger.num_ranks) as record:
        output = shared.run(0, case.rows(0, 0), experts)
    return {
        "output": output.tolist(),
        "chosen": shared.chosen,
        "sent": ledger.sent()[0],
        "torch_bytes": record["bytes"],
    }


@pytest.mark.parametrize("top_k", [1, NUM_EXPERTS])
@pytest.mark.parametrize("num_tokens", [1, 6, 13])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_way_that_moves_fewer_bytes_gives_the_sum(
    pool: RankPool, num_ranks: int, num_tokens: int, top_k: int
) -> None:
    """Law: equal to one process, on every rank; the cheaper way; bytes are the formula's."""
    case = Case(
        placement=linear_placement(
            model="", num_experts=NUM_EXPERTS, num_layers=1, num_ranks=num_ranks
        ),
        tokens=(num_tokens,),
        top_k=top_k,
        dtype=torch.float64,
        model_dim=40,
    )
    rows = case.rows(0, 0)
    expected = compute(rows, set(range(NUM_EXPERTS)), NUM_EXPERTS).tolist()
    done = pool.run(share_tokens, case, num_ranks=num_ranks)
    counted = np.array([one["sent"].num_bytes for one in done])
    for one in done:
        assert one["output"] == expected
        assert one["sent"].num_bytes == one["sent"].predicted_bytes == one["torch_bytes"]
    size = rows.row_bytes()
    bounds = [num_tokens * rank // num_ranks for rank in range(num_ranks + 1)]
    slices = np.diff(bounds)
    counts = np.array(
        [
            Visits.of(
                ExpertPlan.of(case.placement, rank),
                0,
                rows.index[bounds[rank] : bounds[rank + 1]],
            ).counts
            for rank in range(num_ranks)
        ]
    )
    all_reduce = transformers_all_reduce_bytes(np.array([num_tokens, *[0] * (num_ranks - 1)]), size)
    sums = shared_sums_bytes(slices, size).sum()
    assert sums == all_reduce.sum(), "no filling up"
    by_way = {"slices": shared_slices_bytes(counts, slices, size).sum(), "sums": sums}
    assert counted.sum() == min(by_way.values()) + auto_bytes(num_ranks).sum()
    way = min(by_way, key=lambda name: (by_way[name], name == "slices"))
    assert all(one["chosen"] == {"slices": 0, "sums": 0} | {way: 1} for one in done)
    if (num_ranks, num_tokens) == (4, 13):
        assert way == ("slices" if top_k == 1 else "sums"), "both ways occur"
