"""Nodes first: a token crosses to another node once, and there goes to the ranks of its experts.

N nodes of P ranks each, T tokens of this rank, K top-k.
"""

from dataclasses import dataclass

import torch

from moe_runtime.parallel.alltoall import AllToAllDispatcher, AllToAllState, Visits
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.payload import ExactPayload, Payload
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.traffic import COUNT_BYTES

_EXACT = ExactPayload()


@dataclass(frozen=True, slots=True)
class HierarchicalState:
    """How partial sums go back: within the node, then between nodes."""

    between: AllToAllState
    within: AllToAllState


class HierarchicalDispatcher:
    """Two all-to-alls each way instead of one, and fewer bytes between nodes.

    The i-th rank of a node exchanges with the i-th ranks of other nodes, as in the two-dimensional
    all-to-alls of Hetu, Tutel and DeepSpeed: what it gets it hands on, and the partial sums of its
    node it adds up before one row goes home. Between nodes a token is one row, however many ranks
    there have its experts. On one node it is `alltoall` with one exchange of nothing more.
    """

    name = "hierarchical"

    def __init__(self, plan: ExpertPlan, ledger: Ledger, payload: Payload = _EXACT) -> None:
        self._plan = plan
        self._ledger = ledger
        self._alltoall = AllToAllDispatcher(plan, ledger, payload)
        per_node = plan.num_ranks // plan.num_nodes
        node, place = divmod(plan.rank, per_node)
        self._mates = range(node * per_node, (node + 1) * per_node)
        self._peers = range(place, plan.num_ranks, per_node)

    def dispatch(
        self, layer: int, rows: Rows, tokens_by_rank: list[int]
    ) -> tuple[Rows, HierarchicalState]:
        """To this rank's peer on every node that holds any of a token's experts, then on from it.

        A peer chooses again among replicas, those of its node.
        """
        visits = node_visits(self._plan, layer, rows.index)
        passing, between = self._send(layer, rows, visits, self._peers)
        onward = Visits.of(self._plan, layer, passing.index)
        here, within = self._send(layer, passing, onward, self._mates)
        return here, HierarchicalState(between, within)

    def combine(self, output_RD: torch.Tensor, state: HierarchicalState) -> torch.Tensor:
        """The same way back."""
        sums = self._alltoall.combine(output_RD, state.within)
        return self._alltoall.combine(sums, state.between)

    def _send(
        self, layer: int, rows: Rows, visits: Visits, partners: range
    ) -> tuple[Rows, AllToAllState]:
        counts = self._ledger.exchange_counts(layer, visits.counts, partners)
        self._ledger.expect(
            layer, [COUNT_BYTES * (g in partners) for g in range(self._plan.num_ranks)]
        )
        return self._alltoall.send(layer, rows, visits, counts)


def node_visits(plan: ExpertPlan, layer: int, index_TK: torch.Tensor) -> Visits:
    """Where tokens first go: to this rank's peers on the nodes of their experts."""
    per_node = plan.num_ranks // plan.num_nodes
    owner = plan.nearest.owners(layer, index_TK, first_turn=plan.rank)
    peer = owner // per_node * per_node + plan.rank % per_node
    return Visits.to(plan, torch.where(owner < plan.num_ranks, peer, plan.num_ranks))
