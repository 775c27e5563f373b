"""Foretells, from its id and its path so far, the rank that a token should wait on.

T tokens, L MoE layers, G ranks.
"""

from dataclasses import dataclass

import torch

from moe_runtime.errors import PlacementError
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.placement.cocluster import DeviceTables


@dataclass(frozen=True, slots=True, eq=False)
class WaitingRanks:
    """The tables of Sem-MoE (arXiv 2503.04398, algorithm 3) as tensors.

    The paper takes the table of greater confidence. That of ids counts all experts of a token and
    that of paths the first one, so the numbers do not compare, and on the demo checkpoint paths
    overruled ids that were right (all-to-all bytes 0.63 of slices', 0.61 by ids): an id that was
    seen decides, and paths decide for the others.
    """

    token_group: torch.Tensor  # [L, V + 1]; the last id stands for all that are not in the table
    is_seen_row: torch.Tensor  # [L, V + 1] bool
    pair_group: torch.Tensor  # [L, G, G]
    is_seen_pair: torch.Tensor  # [L, G, G] bool

    @classmethod
    def of(cls, tables: DeviceTables, plan: ExpertPlan, device: torch.device) -> "WaitingRanks":
        """Raises PlacementError for tables of another number of ranks or layers."""
        found = (tables.num_gpus, len(tables.token_group))
        wanted = (plan.num_ranks, len(plan.held))
        if found != wanted:
            raise PlacementError(
                f"the tables are for {found[0]} GPUs and {found[1]} MoE layers, and there are "
                f"{wanted[0]} ranks and {wanted[1]} layers; write them with the placement in use, "
                "by `placement solve --tables`"
            )

        def padded(table: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(table, (0, 1)).to(device)

        return cls(
            padded(torch.from_numpy(tables.token_group).long()),
            padded(torch.from_numpy(tables.token_confidence > 0)),
            torch.from_numpy(tables.bigram_group).long().to(device),
            torch.from_numpy(tables.bigram_confidence > 0).to(device),
        )

    def rows(self, token_id_T: torch.Tensor) -> torch.Tensor:
        """`[T]`: places of ids in the tables."""
        last = self.token_group.shape[1] - 1
        return token_id_T.masked_fill((token_id_T < 0) | (token_id_T > last), last)

    def is_seen(self, row_T: torch.Tensor) -> torch.Tensor:
        """`[T]` bool: ids that the recorded text had."""
        return self.is_seen_row[:, row_T].any(0)

    def ranks(
        self, layer: int, row_T: torch.Tensor, before_T: torch.Tensor, last_T: torch.Tensor
    ) -> torch.Tensor:
        """`[T]`, by ranks of the first experts two layers and one layer before; -1 is unknown.

        Tokens that no table knows take turns.
        """
        before, last = before_T.clamp(min=0), last_T.clamp(min=0)
        has_path = (before_T >= 0) & (last_T >= 0) & self.is_seen_pair[layer, before, last]
        turns = torch.arange(len(row_T), device=row_T.device) % self.pair_group.shape[-1]
        otherwise = torch.where(has_path, self.pair_group[layer, before, last], turns)
        is_seen = self.is_seen_row[layer, row_T]
        return torch.where(is_seen, self.token_group[layer, row_T], otherwise)
