"""In how many chunks each forward runs its MoE layers: a fixed number, or what a model of it says.

G ranks, M tokens of the rank that has most, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_runtime.parallel.allreduce import AllReduceDispatcher
from moe_runtime.parallel.hierarchical import HierarchicalDispatcher
from moe_runtime.parallel.traffic import RowBytes
from moe_runtime.perf.interconnect import Interconnect
from moe_runtime.perf.pipeline_degree import PipelineCost, Stage

MOST_CHUNKS = 16
_NONE = Stage(start_seconds=0.0, work_seconds=0.0)
_ALL_TO_ALLS = 3  # of a layer: counts, rows and what comes back; nodes first, twice
_FLOPS_PER_WEIGHT = 2  # a multiplication and an addition for each row


class Degree(Protocol):
    """The same on all ranks, from what all of them know."""

    def chunks(self, tokens_by_rank: Sequence[int], row: RowBytes, top_k: int) -> int:
        """Of a forward with these tokens."""


@dataclass(frozen=True, slots=True)
class FixedDegree:
    """Always as many."""

    number: int

    def chunks(self, tokens_by_rank: Sequence[int], row: RowBytes, top_k: int) -> int:
        return self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedDegree:
    """What `PipelineCost` says, with the alphas and betas of an interconnect file.

    Assumes balanced routing: a token's K experts stand on 1 - (1 - 1 / G)^K of the ranks, and every
    rank computes M K pairs with equally many of its experts. Every chunk starts the products of all
    experts it uses anew.
    """

    interconnect: Interconnect
    dispatch: str
    num_ranks: int
    num_experts: int
    expert_weights: int  # numbers in the matrices of one expert

    def chunks(self, tokens_by_rank: Sequence[int], row: RowBytes, top_k: int) -> int:
        """The closed forms' choice among 1 to MOST_CHUNKS."""
        return self.cost(max(tokens_by_rank), row, top_k).best_degree(MOST_CHUNKS)

    def cost(self, most_tokens: int, row: RowBytes, top_k: int) -> PipelineCost:
        """Of one layer where a rank has `most_tokens` and none has more."""
        return PipelineCost(
            transfer=self._transfer(most_tokens, row, top_k),
            within_node=_NONE,
            experts=self._experts(most_tokens * top_k),
        )

    def _transfer(self, tokens: int, row: RowBytes, top_k: int) -> Stage:
        model, others = self.interconnect, self.num_ranks - 1
        if self.dispatch == AllReduceDispatcher.name:
            gather, scatter = model.all_gather, model.reduce_scatter
            sent = tokens * others
            return Stage(
                start_seconds=gather.alpha_seconds + scatter.alpha_seconds,
                work_seconds=sent * row.routed * gather.beta_seconds
                + sent * row.hidden * scatter.beta_seconds,
            )
        num_exchanges = _ALL_TO_ALLS * (1 + (self.dispatch == HierarchicalDispatcher.name))
        visited = 1 - (1 - 1 / self.num_ranks) ** top_k
        sent_bytes = tokens * others * visited * (row.routed + row.hidden)
        return Stage(
            start_seconds=num_exchanges * model.all_to_all.alpha_seconds,
            work_seconds=sent_bytes * model.all_to_all.beta_seconds,
        )

    def _experts(self, num_pairs: int) -> Stage:
        model = self.interconnect.product
        probed = self.interconnect.weight_shape[0] * self.interconnect.weight_shape[1]
        used = min(num_pairs, -(-self.num_experts // self.num_ranks))
        flops = num_pairs * _FLOPS_PER_WEIGHT * self.expert_weights
        return Stage(
            start_seconds=used * model.alpha_seconds * self.expert_weights / probed,
            work_seconds=flops * model.beta_seconds,
        )
