"""Tokens go to the ranks of their experts and stay with the first one's, after ExFlow.

arXiv 2401.08383, section 4: with the context on every rank a token may wait anywhere, so the way
back of an all-to-all is saved. For more than one expert a token its home follows the expert of the
largest weight, and the sums of the others come there.

G ranks, R rows of this rank, A rows that arrive, H rows whose home is here, K top-k, D model dim.
"""

from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.packed_rows import columns, pack_rows, unpack_rows
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.traffic import CHOICE_BYTES, COUNT_BYTES, NUMBER_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Travellers:
    """Residual stream `[R, D]` of rows, and their numbers `[R]` int32 in the joint forward."""

    hidden: torch.Tensor
    number: torch.Tensor

    def __len__(self) -> int:
        return len(self.hidden)


@dataclass(frozen=True, slots=True, eq=False)
class CoherentState:
    """Which of the arrived rows stay, and where the sums of the others go."""

    layer: int
    arrived: Travellers
    owner_AK: torch.Tensor
    home_A: torch.Tensor
    computed: torch.Tensor  # [c] indices of arrived rows with an expert here
    homes_by_rank: list[int]  # rows that stay with each rank


class CoherentDispatcher:
    """One all-to-all a layer: a row goes once to a rank, however many of its experts are there.

    The residual stream travels, from which norm and shared experts are computed anew. `settle`
    sends the sums of ranks that a row does not stay with to the one that it stays with; they are
    added in float32, or wider where the model is, in ascending order of ranks.
    """

    name = "coherent"

    def __init__(self, plan: ExpertPlan, ledger: Ledger) -> None:
        self._plan = plan
        self._ledger = ledger

    def dispatch(
        self,
        layer: int,
        rows: Travellers,
        routed: Rows,
        origin_N: torch.Tensor | None,
    ) -> tuple[Rows, CoherentState]:
        """Residual stream and routing of the rows with experts here; collective.

        `routed` are the experts of `rows`; with `origin_N`, ranks by number, rows go home for good.
        """
        plan, ledger = self._plan, self._ledger
        num_ranks, top_k = plan.num_ranks, routed.index.shape[1]
        owner_RK = plan.nearest.owners(layer, routed.index, first_turn=plan.rank)
        home_R = _homes(owner_RK, routed.weights, rows.number, origin_N)
        to_rank = torch.zeros((len(rows), num_ranks + 1), dtype=torch.bool, device=home_R.device)
        to_rank.scatter_(1, owner_RK, True).scatter_(1, home_R.unsqueeze(1), True)
        to_rank = to_rank[:, :num_ranks].t()
        counts = torch.stack([to_rank.sum(1), torch.bincount(home_R, minlength=num_ranks)])
        ledger.expect(layer, [2 * num_ranks * COUNT_BYTES] * num_ranks)
        # sync: the host must know the splits
        every = np.array(ledger.all_gather(layer, counts.to(torch.int32)).tolist())
        sent, received = every[plan.rank, 0].tolist(), every[:, 0, plan.rank].tolist()
        token_S = to_rank.nonzero()[:, 1]
        tail = torch.cat([owner_RK.to(torch.int16), rows.number.view(torch.int16).view(-1, 2)], 1)
        packed = torch.cat(
            [
                pack_rows(Rows(rows.hidden, routed.index, routed.weights)),
                tail.contiguous().view(torch.uint8),
            ],
            dim=1,
        )
        ledger.expect(layer, [count * packed.shape[1] for count in sent])
        came = ledger.all_to_all(layer, packed[token_S], sent, received)
        routed_bytes = packed.shape[1] - top_k * CHOICE_BYTES - NUMBER_BYTES
        arrived = unpack_rows(
            came[:, :routed_bytes], Rows(rows.hidden, routed.index, routed.weights)
        )
        number_begin = packed.shape[1] - NUMBER_BYTES
        owner_AK = columns(came, routed_bytes, number_begin, torch.int16).to(torch.int64)
        number_A = columns(came, number_begin, packed.shape[1], torch.int32).squeeze(1)
        is_here = owner_AK == plan.rank
        computed = is_here.any(1).nonzero().squeeze(1)
        here = Rows(
            arrived.hidden[computed],
            arrived.index.masked_fill(~is_here, plan.num_experts)[computed],
            arrived.weights.masked_fill(~is_here, 0)[computed],
        )
        return here, CoherentState(
            layer=layer,
            arrived=Travellers(arrived.hidden, number_A),
            owner_AK=owner_AK,
            home_A=_homes(owner_AK, arrived.weights, number_A, origin_N),
            computed=computed,
            homes_by_rank=every[:, 1].sum(0).tolist(),
        )

    def settle(self, sums: torch.Tensor, state: CoherentState) -> tuple[Travellers, torch.Tensor]:
        """The rows whose home is here, and what their experts made of them `[H, D]`; collective.

        `sums` are of the rows that `dispatch` returned.
        """
        rank, num_ranks = self._plan.rank, self._plan.num_ranks
        home_C = state.home_A[state.computed]
        parts = [sums[home_C == g] if g != rank else sums[:0] for g in range(num_ranks)]
        is_home = state.home_A == rank
        home_row = is_home.cumsum(0) - 1  # place of an arrived row among those that stay
        # Both ends keep the order of arrival: by the rank that sent a row, then as it stood there.
        waited = [
            (is_home & (state.owner_AK == g).any(1)).nonzero().squeeze(1) if g != rank else None
            for g in range(num_ranks)
        ]
        self._ledger.expect(state.layer, [part.nbytes for part in parts])
        came = self._ledger.send_sums(
            state.layer, parts, [0 if rows is None else len(rows) for rows in waited]
        )
        wide = torch.promote_types(sums.dtype, torch.float32)
        staying = is_home.nonzero().squeeze(1)
        total_HD = sums.new_zeros((len(staying), sums.shape[1]), dtype=wide)
        for g, rows in enumerate(waited):
            if rows is None:
                stays = home_C == rank
                total_HD.index_add_(0, home_row[state.computed[stays]], sums[stays].to(wide))
            else:
                total_HD.index_add_(0, home_row[rows], came[g].to(wide))
        kept = Travellers(state.arrived.hidden[staying], state.arrived.number[staying])
        return kept, total_HD.to(sums.dtype)


def _homes(
    owner_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    number_R: torch.Tensor,
    origin_N: torch.Tensor | None,
) -> torch.Tensor:
    """`[R]`: the rank of the expert with the largest weight, or where a row came from."""
    if origin_N is not None:
        return origin_N[number_R.long()]
    return owner_RK.gather(1, weights_RK.argmax(1, keepdim=True)).squeeze(1)
