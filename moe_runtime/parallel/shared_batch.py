"""Expert parallelism where every rank has the same tokens, as beside tensor parallelism.

G ranks, T tokens, M of them this rank's slice, K top-k, D model dim.
"""

import numpy as np
import torch

from moe_runtime.parallel.alltoall import AllToAllDispatcher, Visits
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.ordered_exchange import ComputeExperts
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.traffic import COUNT_BYTES, shared_slices_bytes, shared_sums_bytes

SLICES, SUMS = "slices", "sums"


class SharedBatch:
    """Two ways, of which each forward takes the one that moves fewer bytes.

    Slices: each rank sends M of the tokens to the ranks of their experts, as `alltoall` does, and
    the results are gathered. Sums: each rank computes its experts for all tokens, and partial sums
    are reduced and gathered, which takes the bytes of an all-reduce. All ranks learn all counts of
    tokens, so they choose alike even where rounding makes their routers differ.
    """

    def __init__(self, plan: ExpertPlan, ledger: Ledger) -> None:
        self._plan = plan
        self._ledger = ledger
        self._alltoall = AllToAllDispatcher(plan, ledger)
        self.chosen = {SLICES: 0, SUMS: 0}

    def run(self, layer: int, rows: Rows, compute: ComputeExperts) -> torch.Tensor:
        """`[T, D]`, the same on every rank; `rows` are all tokens."""
        num_ranks, rank = self._plan.num_ranks, self._plan.rank
        bounds = [len(rows) * g // num_ranks for g in range(num_ranks + 1)]
        sizes = np.diff(bounds)
        mine = slice(bounds[rank], bounds[rank + 1])
        part = Rows(rows.hidden[mine], rows.index[mine], rows.weights[mine])
        visits = Visits.of(self._plan, layer, part.index)
        sent = torch.tensor(visits.counts, dtype=torch.int32, device=self._ledger.device)
        self._ledger.expect(layer, [num_ranks * COUNT_BYTES] * num_ranks)
        counts = np.array(self._ledger.all_gather(layer, sent).tolist())  # sync: host splits
        size = rows.row_bytes()
        sums_bytes = shared_sums_bytes(sizes, size)
        if shared_slices_bytes(counts, sizes, size).sum() < sums_bytes.sum():
            self.chosen[SLICES] += 1
            column = counts[:, rank].tolist()
            here, state = self._alltoall.send(layer, part, visits, column)
            total_MD = self._alltoall.combine(_compute(compute, here), state)
            self._ledger.expect(layer, [int(sizes[rank]) * size.hidden] * num_ranks)
        else:
            self.chosen[SUMS] += 1
            total_MD = self._sum_slice(layer, rows, compute, sizes.tolist())
            self._ledger.expect(layer, sums_bytes[rank].tolist())
        return self._gather_slices(layer, total_MD, sizes.tolist())

    def _sum_slice(
        self, layer: int, rows: Rows, compute: ComputeExperts, sizes: list[int]
    ) -> torch.Tensor:
        """`[M, D]`: this rank's slice of the sum, over ranks, of what each one's experts make."""
        is_here = self._plan.any_holder.owners(layer, rows.index, 0) == self._plan.rank
        here = Rows(
            rows.hidden,
            rows.index.masked_fill(~is_here, self._plan.num_experts),
            rows.weights.masked_fill(~is_here, 0),
        )
        parts = _compute(compute, here)
        num_mine = sizes[self._plan.rank]
        came = self._ledger.all_to_all(layer, parts, sizes, [num_mine] * self._plan.num_ranks)
        came = came.view(self._plan.num_ranks, num_mine, came.shape[1])
        wide = torch.promote_types(came.dtype, torch.float32)
        return came.to(wide).sum(0).to(came.dtype)

    def _gather_slices(self, layer: int, total_MD: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """`[T, D]` of every rank's slice; all-to-all, as slices need not be equally large."""
        num_ranks = self._plan.num_ranks
        copies = total_MD.repeat(num_ranks, 1)
        return self._ledger.all_to_all(layer, copies, [len(total_MD)] * num_ranks, sizes)


def _compute(compute: ComputeExperts, rows: Rows) -> torch.Tensor:
    return compute(rows.hidden, rows.index, rows.weights) if len(rows) else rows.hidden
