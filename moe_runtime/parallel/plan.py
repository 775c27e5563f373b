"""Which rank computes an expert for a token, by a placement.

L MoE layers, E experts a layer, G ranks, C ranks to choose from, T tokens, K top-k.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_runtime.errors import PlacementError
from moe_runtime.placement_map import Placement

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, eq=False)
class RankChoice:
    """The ranks that may compute each expert; tokens take turns among them.

    `ranks [L, E + 1, C]` holds `counts [L, E + 1]` of them each. Expert E is nobody: its rank is G.
    """

    ranks: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, may: Array) -> "RankChoice":
        """From `may [L, E, G]`, whether a rank may compute an expert."""
        num_layers, num_experts, num_ranks = may.shape
        counts = may.sum(axis=2)
        most = int(counts.max())
        ranks = np.full((num_layers, num_experts + 1, most), num_ranks, np.int64)
        ranks[:, :-1] = np.argsort(~may, axis=2, kind="stable")[..., :most]
        ones = np.ones((num_layers, 1), np.int64)
        return cls(torch.from_numpy(ranks), torch.from_numpy(np.hstack([counts, ones])))

    def owners(self, layer: int, index_TK: torch.Tensor, first_turn: int) -> torch.Tensor:
        """`[T, K]` ranks; token t takes turn `first_turn + t`."""
        ranks, counts = self.ranks[layer].to(index_TK.device), self.counts[layer]
        if ranks.shape[1] == 1:
            return ranks[index_TK, 0]
        turn_T1 = torch.arange(len(index_TK), device=index_TK.device).unsqueeze(1) + first_turn
        return ranks[index_TK, turn_T1 % counts.to(index_TK.device)[index_TK]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertPlan:
    """The placement as one rank sees it.

    `nearest` chooses for this rank's own tokens: itself if it holds the expert, else its node, else
    any; `any_holder` is the same on every rank, for tokens that every rank knows. In a steady plan
    `nearest` has one holder of each expert, and ranks take turns instead of tokens.
    """

    placement: Placement
    rank: int
    num_ranks: int
    num_nodes: int
    num_experts: int
    held: Array  # [L, E] bool: whether this rank holds an expert
    nearest: RankChoice
    any_holder: RankChoice
    is_steady: bool

    @classmethod
    def of(cls, placement: Placement, rank: int, *, is_steady: bool = False) -> "ExpertPlan":
        """Rank g is the placement's GPU g."""
        hosts = placement.hosts().transpose(0, 2, 1)  # [L, E, G]
        per_node = placement.gpus // placement.nodes
        first = rank // per_node * per_node
        on_node = np.zeros_like(hosts)
        on_node[..., first : first + per_node] = hosts[..., first : first + per_node]
        on_rank = np.zeros_like(hosts)
        on_rank[..., rank] = hosts[..., rank]
        may = np.where(on_node.any(axis=2, keepdims=True), on_node, hosts)
        may = np.where(on_rank.any(axis=2, keepdims=True), on_rank, may)
        if is_steady:
            turn = rank % may.sum(axis=2, keepdims=True)
            may = may & (may.cumsum(axis=2) == turn + 1)
        return cls(
            placement=placement,
            rank=rank,
            num_ranks=placement.gpus,
            num_nodes=placement.nodes,
            num_experts=placement.num_experts,
            held=hosts[..., rank].copy(),
            nearest=RankChoice.of(may),
            any_holder=RankChoice.of(hosts),
            is_steady=is_steady,
        )

    @property
    def num_held(self) -> int:
        """Experts that this rank holds, all layers together."""
        return int(self.held.sum())


def linear_placement(
    *,
    model: str,
    num_experts: int,
    num_layers: int,
    num_ranks: int,
    num_nodes: int = 1,
    checkpoint: str = "",
) -> Placement:
    """Expert e on rank e // (E / G) in every layer. Raises PlacementError if E / G is not whole."""
    if num_experts % num_ranks:
        raise PlacementError(
            f"{num_experts} experts a layer do not divide among {num_ranks} ranks; start a number "
            "of ranks that divides them, or give a placement with replicas"
        )
    return Placement(
        model=model,
        num_experts=num_experts,
        num_hidden_layers=num_layers,
        layer_ids=tuple(range(num_layers)),
        gpus=num_ranks,
        nodes=num_nodes,
        slots=np.tile(np.arange(num_experts), (num_layers, 1)),
        checkpoint=checkpoint,
        made={"solver": "linear"},
    )


def check_placement(
    placement: Placement, *, num_experts: int, num_layers: int, num_ranks: int, checkpoint: str
) -> None:
    """Raise PlacementError unless the placement is for such a model on so many ranks.

    `checkpoint` is the digest of the model's weights; where it or the placement's is "", unknown,
    shapes alone decide.
    """
    if placement.gpus != num_ranks:
        raise PlacementError(
            f"the placement is for {placement.gpus} GPUs and there are {num_ranks} ranks; start "
            f"{placement.gpus} ranks, or solve again with --gpus {num_ranks}"
        )
    if (placement.num_layers, placement.num_experts) != (num_layers, num_experts):
        raise PlacementError(
            f"the placement, made for {placement.model or 'a model without name'}, has "
            f"{placement.num_layers} MoE layers of {placement.num_experts} experts, and this model "
            f"{num_layers} of {num_experts}; solve one from a trace of this model"
        )
    if "" not in (placement.checkpoint, checkpoint) and placement.checkpoint != checkpoint:
        raise PlacementError(
            f"the placement belongs to another model of the same shape: it was made for "
            f"{placement.model or 'a model without name'}, checkpoint {placement.checkpoint}, and "
            f"this is checkpoint {checkpoint}; solve one from a trace of this model"
        )
