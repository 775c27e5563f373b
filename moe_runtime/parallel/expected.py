"""Bytes that each dispatcher may be expected to move, before any routing is known.

G ranks, E experts a layer, K top-k.
"""

from dataclasses import dataclass
from math import comb

from moe_runtime.parallel.traffic import CHOICE_BYTES, NUMBER_BYTES, RowBytes

# Real routing is less even: gpt-oss-20b's top-4 on 4 ranks visits 3 % more of them.
_WORTH_IT = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedBytes:
    """Off the rank, a token and MoE layer, of many tokens on each rank.

    Assumes K experts drawn evenly, equal parts of them on every rank, equally many tokens, and no
    relation between layers; counts of rows are left out, as batches share them.
    """

    alltoall: float
    allreduce: float
    coherent: float

    @classmethod
    def of(
        cls,
        *,
        num_ranks: int,
        num_experts: int,
        top_k: int,
        row: RowBytes,
        kv_bytes_per_moe_layer: float,
    ) -> "ExpectedBytes":
        """`kv_bytes_per_moe_layer`: what all decoder layers cache of a token, by MoE layers."""
        elsewhere = num_experts - num_experts // num_ranks
        has_one = 1 - comb(elsewhere, top_k) / comb(num_experts, top_k)
        others = num_ranks - 1
        visits, sums = others * has_one, num_ranks * has_one - 1
        traveller = row.routed + top_k * CHOICE_BYTES + NUMBER_BYTES
        return cls(
            alltoall=visits * (row.routed + row.hidden),
            allreduce=others * (row.routed + row.hidden),
            coherent=visits * traveller + sums * row.hidden + others * kv_bytes_per_moe_layer,
        )

    @property
    def is_coherent_least(self) -> bool:
        """Whether keeping the context everywhere costs clearly less than the way back it saves."""
        return self.coherent < _WORTH_IT * min(self.alltoall, self.allreduce)
