"""Every rank gets every token, and the sums over ranks come back.

G ranks, T tokens of this rank, M tokens of the rank with most, K top-k, D model dim.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.packed_rows import pack_rows, unpack_rows
from moe_runtime.parallel.plan import ExpertPlan


@dataclass(frozen=True, slots=True)
class AllReduceState:
    """How many rows of the sum are this rank's."""

    layer: int
    num_tokens: int


class AllReduceDispatcher:
    """Two collectives of equal parts: tokens gathered, their sums reduced and scattered.

    Of an all-reduce only the half that this rank needs: its own tokens' sums. Pays where tokens use
    nearly all ranks anyhow: few ranks, large k. Ranks with fewer tokens fill up with rows that ask
    for no expert. Sums are taken in the dtype of hidden states, in the order of the collective.
    """

    name = "allreduce"

    def __init__(self, plan: ExpertPlan, ledger: Ledger) -> None:
        self._plan = plan
        self._ledger = ledger

    def dispatch(
        self, layer: int, rows: Rows, tokens_by_rank: list[int]
    ) -> tuple[Rows, AllReduceState]:
        """All tokens of all ranks, by rank, with the experts that this rank computes."""
        nobody, num_most = self._plan.num_experts, max(tokens_by_rank)
        size = rows.row_bytes()
        self._ledger.expect(layer, [num_most * (size.routed + size.hidden)] * self._plan.num_ranks)
        fill = (0, 0, 0, num_most - len(rows))
        filled = Rows(
            functional.pad(rows.hidden, fill),
            functional.pad(rows.index, fill, value=nobody),
            functional.pad(rows.weights, fill),
        )
        packed = self._ledger.all_gather(layer, pack_rows(filled)).flatten(0, 1)
        every = unpack_rows(packed, rows)
        is_here = self._plan.any_holder.owners(layer, every.index, first_turn=0) == self._plan.rank
        here = Rows(
            every.hidden,
            every.index.masked_fill(~is_here, nobody),
            every.weights.masked_fill(~is_here, 0),
        )
        return here, AllReduceState(layer, len(rows))

    def combine(self, output_RD: torch.Tensor, state: AllReduceState) -> torch.Tensor:
        """This rank's part of the sum over ranks."""
        parts = output_RD.view(self._plan.num_ranks, -1, output_RD.shape[1])
        return self._ledger.reduce_scatter(state.layer, parts)[: state.num_tokens]
