"""Beside attention whose heads are shared out: rows are summed where their experts should be.

Sem-MoE (arXiv 2503.04398, section 4.3): the all-reduce behind attention is split into its halves.
The reduce-scatter takes each token to the rank that tables foretell, norm, router and MoE run
there, so that only what was foretold wrongly enters the all-to-all, and the all-gather brings all
rows back to every rank. Without tables each rank takes a slice of the tokens.

G ranks, T tokens that every rank has, M of them that wait on this rank, K top-k, D model dim.
"""

from collections.abc import Callable

import torch

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.expert_parallel import ExpertParallel
from moe_runtime.parallel.ledger import ATTENTION
from moe_runtime.parallel.packed_rows import columns
from moe_runtime.parallel.traffic import CHOICE_BYTES
from moe_runtime.parallel.waiting_ranks import WaitingRanks

# The second half of a decoder layer for rows `[M, D]`, by what its experts answer.
SecondHalf = Callable[[torch.Tensor, Callable[[Rows], torch.Tensor]], torch.Tensor]


class ShuffledForward:
    """The forwards of one model whose attention heads are shared out; all ranks run the same.

    Rows travel in the dtype of hidden states; addends are added in float32, or wider where the
    model is, in ascending order of ranks, so that every rank goes on with the same bits.
    """

    def __init__(
        self,
        parallel: ExpertParallel,
        dispatcher: AllToAllDispatcher,
        like: Rows,
        waiting: WaitingRanks | None,
    ) -> None:
        self._parallel = parallel
        self._dispatcher = dispatcher
        self._like = like
        self._waiting = waiting
        self._ledger = parallel.world.ledger
        self._row_T = torch.empty(0, dtype=torch.int64)
        self._is_seen_T = torch.empty(0, dtype=torch.bool)
        self._path = (self._row_T, self._row_T)  # ranks of first experts, two and one layers ago

    def begin(self, hidden_TD: torch.Tensor, token_id_T: torch.Tensor) -> None:
        """Agree on a forward of these tokens; collective."""
        like = self._like
        step = self._parallel.begin(Rows(hidden_TD, like.index, like.weights))
        if len(set(step.tokens_by_rank)) > 1:
            raise ParallelError(
                f"ranks run forwards of {step.tokens_by_rank} tokens; with tensor-parallel "
                "attention all ranks run the same prompts, and none ends before the others"
            )
        nowhere = torch.full_like(token_id_T, -1)
        self._path = (nowhere, nowhere)
        if self._waiting is not None:
            self._row_T = self._waiting.rows(token_id_T)
            self._is_seen_T = self._waiting.is_seen(self._row_T)
        else:
            self._is_seen_T = torch.zeros_like(token_id_T, dtype=torch.bool)

    def end(self) -> None:
        """Every layer has run."""
        self._parallel.end()

    def take_part(self) -> bool:
        """Meet the others behind the last forward; there is nothing to do for them."""
        if not self._parallel.begin(None).is_idle:
            raise ParallelError(
                f"rank {self._ledger.rank} is done and others go on; with tensor-parallel "
                "attention all ranks run the same prompts"
            )
        return False

    def run_layer(
        self,
        moe_layer: int | None,
        stream_TD: torch.Tensor,
        attention_TD: torch.Tensor,
        second_half: SecondHalf,
    ) -> torch.Tensor:
        """`[T, D]` behind the layer, on every rank, from this rank's addends of attention."""
        rank, num_ranks = self._ledger.rank, self._ledger.num_ranks
        rank_T = self._ranks(moe_layer, len(stream_TD))
        order = rank_T.argsort(stable=True)
        counts = torch.bincount(rank_T, minlength=num_ranks).tolist()  # sync: host splits
        parts = torch.split(attention_TD[order], counts)
        self._ledger.expect(ATTENTION, [part.nbytes for part in parts])
        came = self._ledger.send_sums(ATTENTION, parts, [counts[rank]] * num_ranks)
        wide = torch.promote_types(attention_TD.dtype, torch.float32)
        total_MD = torch.stack(came).to(wide).sum(0).to(attention_TD.dtype)
        mine = torch.split(order, counts)[rank]
        first_M = torch.full((len(mine),), -1, dtype=torch.int16, device=mine.device)

        def experts(rows: Rows) -> torch.Tensor:
            nonlocal first_M
            output, first_M = self._run_experts(moe_layer, rows, self._is_seen_T[mine])
            return output

        rows_MD = stream_TD[mine] + total_MD
        if len(mine):
            rows_MD = second_half(rows_MD, experts)
        elif moe_layer is not None:
            experts(self._like)
        return self._gather(moe_layer, rows_MD, first_M, order, counts)

    def _ranks(self, moe_layer: int | None, num_tokens: int) -> torch.Tensor:
        if self._waiting is not None and moe_layer is not None:
            return self._waiting.ranks(moe_layer, self._row_T, *self._path)
        place = torch.arange(num_tokens, device=self._ledger.device)
        return place * self._ledger.num_ranks // max(num_tokens, 1)

    def _run_experts(
        self, layer: int | None, rows: Rows, is_seen_M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts make of the rows that wait here, and the ranks of their first ones."""
        assert layer is not None
        plan = self._parallel.plan
        owner = plan.nearest.owners(layer, rows.index, first_turn=plan.rank)
        self._parallel.activations.add(owner == plan.rank, is_seen_M)
        here, state = self._dispatcher.dispatch(layer, rows, [])
        sums = self._parallel.compute(layer, here) if len(here) else here.hidden
        first = owner.gather(1, rows.weights.argmax(1, keepdim=True)).squeeze(1)
        return self._dispatcher.combine(sums, state), first.to(torch.int16)

    def _gather(
        self,
        moe_layer: int | None,
        rows_MD: torch.Tensor,
        first_M: torch.Tensor,
        order: torch.Tensor,
        counts: list[int],
    ) -> torch.Tensor:
        """`[T, D]` in the order of tokens; with tables the first experts' ranks come along."""
        shows_path = self._waiting is not None and moe_layer is not None
        packed = rows_MD.contiguous().view(torch.uint8)
        width = packed.shape[1]
        if shows_path:
            packed = torch.cat([packed, first_M.unsqueeze(1).view(torch.uint8)], 1)
        self._ledger.expect(ATTENTION, [packed.nbytes] * len(counts))
        every = torch.cat(self._ledger.gather_rows(ATTENTION, packed, counts))
        gathered = columns(every, 0, width, rows_MD.dtype)
        if shows_path:
            first = columns(every, width, width + CHOICE_BYTES, torch.int16).squeeze(1).long()
            self._path = (self._path[1], torch.empty_like(first).scatter_(0, order, first))
        return torch.empty_like(gathered).index_copy_(0, order, gathered)
