"""Whether tokens should go to other nodes once each, by what links within and between nodes cost.

N nodes of P ranks each, G ranks, M tokens of the rank that has most, E experts a layer, K top-k.
"""

from dataclasses import dataclass
from math import comb

from moe_runtime.parallel.traffic import RowBytes
from moe_runtime.perf.alpha_beta import AlphaBeta
from moe_runtime.perf.interconnect import Interconnect

_EXCHANGES = 3  # of an all-to-all dispatch: counts, rows and what comes back


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLinks:
    """One alpha and beta for messages of a rank to its node, and one for those to its peers.

    Assumes evenly drawn experts, equal parts of them on every rank, equally many tokens; that a
    start between nodes is taken for each rank of a node that is written to, where the fit is of
    one; and that messages of either kind wait for the other.
    """

    within_node: AlphaBeta
    between_nodes: AlphaBeta
    num_nodes: int
    num_ranks: int
    num_experts: int

    @classmethod
    def of(
        cls, network: Interconnect, *, num_nodes: int, num_ranks: int, num_experts: int
    ) -> "NodeLinks | None":
        """None on one node, with a rank a node, or where links were not measured apart."""
        within, between = network.within_node, network.between_nodes
        if within is None or between is None or not 1 < num_nodes < num_ranks:
            return None
        return cls(
            within_node=within,
            between_nodes=between,
            num_nodes=num_nodes,
            num_ranks=num_ranks,
            num_experts=num_experts,
        )

    def prefers_nodes_first(self, most_tokens: int, row: RowBytes, top_k: int) -> bool:
        """Whether `hierarchical` is expected to take less than `alltoall`; same on all ranks."""
        by_node = self.hierarchical_seconds(most_tokens, row, top_k)
        return by_node < self.alltoall_seconds(most_tokens, row, top_k)

    def alltoall_seconds(self, most_tokens: int, row: RowBytes, top_k: int) -> float:
        """A row to each rank that has an expert, wherever it is."""
        per_node = self.num_ranks // self.num_nodes
        rows = most_tokens * self._used(self.num_ranks, top_k) / self.num_ranks
        return self._seconds(
            rows * (per_node - 1), rows * (self.num_ranks - per_node), row, starts=per_node
        )

    def hierarchical_seconds(self, most_tokens: int, row: RowBytes, top_k: int) -> float:
        """A row to each node that has an expert, and on from there to the ranks."""
        per_node = self.num_ranks // self.num_nodes
        others = self.num_nodes - 1
        between = most_tokens * self._used(self.num_nodes, top_k) * others / self.num_nodes
        within = most_tokens * self._used(self.num_ranks, top_k) * (per_node - 1) / per_node
        return self._seconds(within, between, row, starts=1)

    def _used(self, parts: int, top_k: int) -> float:
        """Of so many equal parts of the experts, how many a token has an expert in."""
        elsewhere = self.num_experts - self.num_experts // parts
        return parts * (1 - comb(elsewhere, top_k) / comb(self.num_experts, top_k))

    def _seconds(self, within: float, between: float, row: RowBytes, *, starts: int) -> float:
        row_bytes = row.routed + row.hidden
        begin = self.within_node.alpha_seconds + starts * self.between_nodes.alpha_seconds
        return (
            _EXCHANGES * begin
            + within * row_bytes * self.within_node.beta_seconds
            + between * row_bytes * self.between_nodes.beta_seconds
        )
