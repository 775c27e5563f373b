"""Bytes that each dispatcher may be expected to move, before any routing is known.

G ranks, E experts a layer, K top-k.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb

from moe_runtime.parallel.traffic import CHOICE_BYTES, NUMBER_BYTES, RowBytes
from moe_runtime.placement_map import Placement

# Real routing is less even: gpt-oss-20b's top-4 on 4 ranks visits 3 % more of them.
_WORTH_IT = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Affinity:
    """How a routing sits on a placement: means over tokens and layers."""

    fanout: float  # distinct ranks of a token's experts, 1 to G
    crossing_fraction: float  # of first experts: on another rank than that of the layer before

    @classmethod
    def even(cls, *, num_ranks: int, num_experts: int, top_k: int) -> "Affinity":
        """K experts drawn evenly, equal parts of them on every rank, layers without relation."""
        elsewhere = num_experts - num_experts // num_ranks
        has_one = 1 - comb(elsewhere, top_k) / comb(num_experts, top_k)
        return cls(fanout=num_ranks * has_one, crossing_fraction=1 - 1 / num_ranks)

    @classmethod
    def of(cls, placement: Placement, top_k: int) -> "Affinity | None":
        """What `placement solve` found on a trace with as many experts a token.

        None where the placement does not say it, or has replicas, among which dispatchers choose
        each in their way.
        """
        judged = placement.made.get("judged")
        if not isinstance(judged, Mapping) or placement.is_replicated:
            return None
        found = [judged.get(name) for name in ("top_k", "fanout", "crossing_fraction")]
        if not all(isinstance(value, int | float) for value in found) or found[0] != top_k:
            return None
        fanout, crossing = float(found[1]), float(found[2])  # type: ignore[arg-type]
        if not (1 <= fanout <= placement.gpus and 0 <= crossing <= 1):
            return None
        return cls(fanout=fanout, crossing_fraction=crossing)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedBytes:
    """Off the rank, a token and MoE layer, of many tokens on each rank.

    Assumes equally many tokens on every rank, wherever their experts are; counts of rows are left
    out, as batches share them. Of a token's further experts none is expected where it waits for the
    first, if they are drawn less evenly than by chance: then coherent dispatch moves less.
    """

    alltoall: float
    allreduce: float
    coherent: float

    @classmethod
    def of(
        cls,
        *,
        num_ranks: int,
        top_k: int,
        affinity: Affinity,
        row: RowBytes,
        kv_bytes_per_moe_layer: float,
    ) -> "ExpectedBytes":
        """`kv_bytes_per_moe_layer`: what all decoder layers cache of a token, by MoE layers."""
        fanout, others = affinity.fanout, num_ranks - 1
        visits, sums = fanout * others / num_ranks, fanout - 1
        here = max(1 - affinity.crossing_fraction, fanout / num_ranks)
        traveller = row.routed + top_k * CHOICE_BYTES + NUMBER_BYTES
        return cls(
            alltoall=visits * (row.routed + row.hidden),
            allreduce=others * (row.routed + row.hidden),
            coherent=(fanout - here) * traveller
            + sums * row.hidden
            + others * kv_bytes_per_moe_layer,
        )

    @property
    def is_coherent_least(self) -> bool:
        """Whether keeping the context everywhere costs clearly less than the way back it saves."""
        return self.coherent < _WORTH_IT * min(self.alltoall, self.allreduce)
