"""Chooses between dispatchers, layer by layer, by the bytes that each would move."""

from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.parallel.allreduce import AllReduceDispatcher, AllReduceState
from moe_runtime.parallel.alltoall import AllToAllDispatcher, AllToAllState, Visits
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.hierarchical import HierarchicalDispatcher, HierarchicalState
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.node_links import NodeLinks
from moe_runtime.parallel.payload import ExactPayload, Payload
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.traffic import COUNT_BYTES, allreduce_bytes, alltoall_bytes

_EXACT = ExactPayload()


@dataclass(frozen=True, slots=True)
class AutoState:
    """Which dispatcher was chosen is told by the state that it made."""

    chosen: AllToAllState | AllReduceState | HierarchicalState


class AutoDispatcher:
    """Every rank learns all counts, so every rank makes the same choice.

    Equal bytes go to allreduce, whose equal parts cost less to prepare. Where `links` are known,
    numbers of tokens alone decide first whether nodes come first.
    """

    name = "auto"

    def __init__(
        self,
        plan: ExpertPlan,
        ledger: Ledger,
        payload: Payload = _EXACT,
        links: NodeLinks | None = None,
    ) -> None:
        self._links = links
        self._hierarchical = HierarchicalDispatcher(plan, ledger, payload)
        self._plan = plan
        self._ledger = ledger
        self._payload = payload
        self._alltoall = AllToAllDispatcher(plan, ledger, payload)
        self._allreduce = AllReduceDispatcher(plan, ledger)
        self.chosen = {AllToAllDispatcher.name: 0, AllReduceDispatcher.name: 0}

    def dispatch(self, layer: int, rows: Rows, tokens_by_rank: list[int]) -> tuple[Rows, AutoState]:
        """Counts of all pairs of ranks, then what the chosen one does."""
        size, top_k = rows.row_bytes(self._payload), rows.index.shape[1]
        if self._links is not None and self._links.prefers_nodes_first(
            max(tokens_by_rank), size, top_k
        ):
            self.chosen[HierarchicalDispatcher.name] = (
                self.chosen.get(HierarchicalDispatcher.name, 0) + 1
            )
            passed, way = self._hierarchical.dispatch(layer, rows, tokens_by_rank)
            return passed, AutoState(way)
        num_ranks = self._plan.num_ranks
        visits = Visits.of(self._plan, layer, rows.index)
        mine = torch.tensor(visits.counts, dtype=torch.int32, device=self._ledger.device)
        self._ledger.expect(layer, [num_ranks * COUNT_BYTES] * num_ranks)
        counts = np.array(self._ledger.all_gather(layer, mine).tolist())  # sync: host splits
        alltoall = alltoall_bytes(counts, size)
        alltoall -= COUNT_BYTES * (1 - np.eye(num_ranks, dtype=int))
        # Sums cannot be rounded on their way, so allreduce moves every bit.
        allreduce = allreduce_bytes(np.array(tokens_by_rank), rows.row_bytes())
        if allreduce.sum() <= alltoall.sum():
            self.chosen[AllReduceDispatcher.name] += 1
            here, state = self._allreduce.dispatch(layer, rows, tokens_by_rank)
            return here, AutoState(state)
        self.chosen[AllToAllDispatcher.name] += 1
        column = counts[:, self._plan.rank].tolist()
        here, sent = self._alltoall.send(layer, rows, visits, column)
        return here, AutoState(sent)

    def combine(self, output_RD: torch.Tensor, state: AutoState) -> torch.Tensor:
        """What the chosen one does."""
        if isinstance(state.chosen, AllToAllState):
            return self._alltoall.combine(output_RD, state.chosen)
        if isinstance(state.chosen, HierarchicalState):
            return self._hierarchical.combine(output_RD, state.chosen)
        return self._allreduce.combine(output_RD, state.chosen)
