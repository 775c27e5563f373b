"""An all-to-all whose results have the bits of one process.

G ranks, T tokens of this rank, P pairs of a token and an expert, K top-k, E experts, D model dim.
"""

from collections.abc import Callable

import torch

from moe_runtime.parallel.alltoall import AllToAllDispatcher, Visits
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.plan import ExpertPlan
from moe_runtime.parallel.traffic import COUNT_BYTES

# `[T, D]`, `[T, K]`, `[T, K]` -> weighted sum of the experts that are here, `[T, D]`.
ComputeExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# The dtype in which one process adds up experts, by those of hidden states and router weights.
SumDtype = Callable[[torch.dtype, torch.dtype], torch.dtype]


class OrderedExchange:
    """Tokens go once to a rank, as with `alltoall`; each of their experts answers by itself.

    Two things fix bits: how many rows a matrix product has, and the order of sums. So what comes
    from a rank is computed by itself, all rows of an expert together, in the order that they have
    in one process; and the rank that a token came from weighs and adds, in ascending order of
    experts. A row for each pair is what comes back. `plan` must be steady: a rank's tokens have one
    holder of each expert.
    """

    def __init__(self, plan: ExpertPlan, ledger: Ledger) -> None:
        self._plan = plan
        self._ledger = ledger
        self._alltoall = AllToAllDispatcher(plan, ledger)

    def run(
        self, layer: int, rows: Rows, compute: ComputeExperts, sum_dtype: SumDtype
    ) -> torch.Tensor:
        """`[T, D]`; every rank calls it for every layer, with tokens or without."""
        plan, ledger = self._plan, self._ledger
        owner_TK = plan.nearest.owners(layer, rows.index, first_turn=0)
        visits = Visits.to(plan, owner_TK)
        counts = ledger.exchange_counts(layer, visits.counts)
        ledger.expect(layer, [COUNT_BYTES] * plan.num_ranks)
        here, state = self._alltoall.send(layer, rows, visits, counts)
        own, *away = [
            self._answers(part, compute)
            for part in _split(here, [len(state.own_tokens), *state.received])
        ]
        asked = [_pairs(owner_TK == g) for g in range(plan.num_ranks)]
        come = [0 if g == plan.rank else len(token) for g, (_, token) in enumerate(asked)]
        ledger.expect(layer, [part.nbytes for part in away])
        back = ledger.all_to_all(layer, torch.cat(away), [len(part) for part in away], come)
        answers = list(torch.split(back, come))
        answers[plan.rank] = own
        answer_TKD = rows.hidden.new_zeros((*rows.index.shape, rows.hidden.shape[1]))
        for (place, token), part in zip(asked, answers, strict=True):
            answer_TKD[token, place] = part
        return _sum_in_order(rows, answer_TKD, sum_dtype)

    def _answers(self, rows: Rows, compute: ComputeExperts) -> torch.Tensor:
        """`[P, D]`: what experts make of rows, unweighted."""
        place, row = _pairs(rows.index < self._plan.num_experts)
        if not len(row):
            return rows.hidden[:0]
        expert_P1 = rows.index[row, place].unsqueeze(1)
        ones_P1 = torch.ones_like(expert_P1, dtype=rows.weights.dtype)
        return compute(rows.hidden[row], expert_P1, ones_P1)


def _pairs(is_asked_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places among the top-k `[P]` and tokens `[P]`, sorted by the former, as one process does."""
    place, token = is_asked_TK.t().nonzero(as_tuple=True)
    return place, token


def _split(rows: Rows, sizes: list[int]) -> list[Rows]:
    parts = [torch.split(tensor, sizes) for tensor in (rows.hidden, rows.index, rows.weights)]
    return [Rows(*part) for part in zip(*parts, strict=True)]


def _sum_in_order(rows: Rows, answer_TKD: torch.Tensor, sum_dtype: SumDtype) -> torch.Tensor:
    dtype = sum_dtype(rows.hidden.dtype, rows.weights.dtype)
    total_TD = torch.zeros_like(rows.hidden, dtype=dtype)
    token = torch.arange(len(rows), device=rows.hidden.device)
    for place in rows.index.argsort(1).unbind(1):
        weight_T1 = rows.weights[token, place].unsqueeze(1)
        total_TD += (answer_TKD[token, place] * weight_T1).to(dtype)
    return total_TD.to(rows.hidden.dtype)
