"""Tokens travel once to every rank that holds any of their experts, and partial sums travel back.

T tokens of this rank, S copies of them that are sent, R rows to compute here, K top-k, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.packed_rows import pack_rows, unpack_rows
from moe_runtime.parallel.payload import ExactPayload, Payload
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.traffic import COUNT_BYTES

_EXACT = ExactPayload()


@dataclass(frozen=True, slots=True, eq=False)
class Visits:
    """Where the tokens of one layer go: `owner [T, K]` ranks, and distinct tokens by rank."""

    owner: torch.Tensor
    to_rank: torch.Tensor  # [G, T] bool
    counts: list[int]  # [G]

    @classmethod
    def of(cls, plan: ExpertPlan, layer: int, index_TK: torch.Tensor) -> "Visits":
        """To the owners of all experts."""
        return cls.to(plan, plan.nearest.owners(layer, index_TK, first_turn=plan.rank))

    @classmethod
    def to(cls, plan: ExpertPlan, owner: torch.Tensor) -> "Visits":
        """To `owner [T, K]`; rank G is nobody."""
        to_rank = torch.zeros(
            (len(owner), plan.num_ranks + 1), dtype=torch.bool, device=owner.device
        )
        to_rank = to_rank.scatter_(1, owner, True)[:, : plan.num_ranks].t()
        return cls(owner, to_rank, to_rank.sum(1).tolist())  # sync: the host must know the splits


@dataclass(frozen=True, slots=True, eq=False)
class AllToAllState:
    """How the partial sums go back: own rows first, then those of other ranks, by rank."""

    layer: int
    num_tokens: int
    own_tokens: torch.Tensor
    sent_tokens: torch.Tensor
    sent: list[int]
    received: list[int]


class AllToAllDispatcher:
    """Dropless. A token goes once to a rank, however many of its experts are there.

    The rank weighs and adds up what its experts make of the token, and one row returns. Partial
    sums are added in float32, or wider where the model is, in ascending order of ranks, the own
    rank first. Hidden states travel as `payload` writes them, both ways.
    """

    name = "alltoall"

    def __init__(self, plan: ExpertPlan, ledger: Ledger, payload: Payload = _EXACT) -> None:
        self._plan = plan
        self._ledger = ledger
        self._payload = payload

    def dispatch(
        self, layer: int, rows: Rows, tokens_by_rank: list[int]
    ) -> tuple[Rows, AllToAllState]:
        """Counts first, then the rows."""
        visits = Visits.of(self._plan, layer, rows.index)
        received = self._ledger.exchange_counts(layer, visits.counts)
        self._ledger.expect(layer, [COUNT_BYTES] * self._plan.num_ranks)
        return self.send(layer, rows, visits, received)

    def send(
        self, layer: int, rows: Rows, visits: Visits, counts_here: Sequence[int]
    ) -> tuple[Rows, AllToAllState]:
        """The rows, when `counts_here [G]`, what each rank sends to this one, is known."""
        rank, nobody = self._plan.rank, self._plan.num_experts
        to_others = visits.to_rank.clone()
        to_others[rank] = False
        rank_S, token_S = to_others.nonzero(as_tuple=True)
        own = visits.to_rank[rank].nonzero().squeeze(1)
        sent = [0 if g == rank else count for g, count in enumerate(visits.counts)]
        received = [0 if g == rank else count for g, count in enumerate(counts_here)]
        size = rows.row_bytes(self._payload)
        self._ledger.expect(layer, [count * size.routed for count in sent])

        def select(token_n: torch.Tensor, rank_n: torch.Tensor | int) -> Rows:
            is_there = visits.owner[token_n] == rank_n
            return Rows(
                rows.hidden[token_n],
                rows.index[token_n].masked_fill(~is_there, nobody),
                rows.weights[token_n].masked_fill(~is_there, 0),
            )

        away = pack_rows(select(token_S, rank_S.unsqueeze(1)), self._payload)
        packed = self._ledger.all_to_all(layer, away, sent, received)
        came = unpack_rows(packed, rows, self._payload)
        mine = select(own, rank)
        here = Rows(
            torch.cat([mine.hidden, came.hidden]),
            torch.cat([mine.index, came.index]),
            torch.cat([mine.weights, came.weights]),
        )
        return here, AllToAllState(layer, len(rows), own, token_S, sent, received)

    def combine(self, output_RD: torch.Tensor, state: AllToAllState) -> torch.Tensor:
        """Partial sums back to the tokens' ranks."""
        num_own = len(state.own_tokens)
        away = self._payload.encode(output_RD[num_own:])
        self._ledger.expect(state.layer, [count * away.shape[1] for count in state.received])
        packed = self._ledger.all_to_all(state.layer, away, state.received, state.sent)
        back = self._payload.decode(packed, output_RD.dtype)
        wide = torch.promote_types(output_RD.dtype, torch.float32)
        total_TD = output_RD.new_zeros((state.num_tokens, output_RD.shape[1]), dtype=wide)
        total_TD.index_add_(0, state.own_tokens, output_RD[:num_own].to(wide))
        total_TD.index_add_(0, state.sent_tokens, back.to(wide))
        return total_TD.to(output_RD.dtype)
