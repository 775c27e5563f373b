"""`DistributedConfig(ep_implementation="moe_runtime")`: our dispatch in transformers' own seam."""

from typing import Any

import torch

from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.dispatcher import Rows
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.plan import ExpertPlan, linear_placement
from moe_runtime.parallel.shared_batch import SharedBatch

try:
    from transformers.distributed.expert_parallel import AllToAllEP, EPImplementationInterface
except ImportError:  # before transformers 5.20; moe_runtime.load() shares experts there too
    HAS_SEAM = False
else:
    HAS_SEAM = True


def register_ep_implementation(name: str) -> None:
    """Make `DistributedConfig(ep_implementation=name)` work, where transformers has the seam."""
    if HAS_SEAM:
        EPImplementationInterface.register(name, _made_here)


def _made_here(experts: torch.nn.Module, ep_mesh: Any, tp_mesh: Any) -> "RankExperts":
    return RankExperts(AllToAllEP(experts, ep_mesh, tp_mesh))


class RankExperts:
    """One experts module, of which this rank holds an equal part; called with the batch's tokens.

    Ranks that share a batch take slices or sums, whichever moves fewer bytes; ranks with batches of
    their own send each token once to a rank. Training runs transformers' all_to_all, as ours has no
    backward.
    """

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs
        size = theirs.ep_mesh.size()
        self._num_local = theirs.num_local_experts
        placement = linear_placement(
            model="", num_experts=self._num_local * size, num_layers=1, num_ranks=size
        )
        self._plan = ExpertPlan.of(placement, theirs.ep_mesh.get_local_rank())
        self._made: tuple[SharedBatch, AllToAllDispatcher] | None = None
        self.ledger: Ledger | None = None  # once a forward has told the device

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, hidden_TD: torch.Tensor, top_k_index_TK: torch.Tensor, top_k_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and hidden_TD.requires_grad:
            output: torch.Tensor = self._theirs(hidden_TD, top_k_index_TK, top_k_weights_TK)
            return output
        if self._made is None:
            group = self._theirs.ep_mesh.get_group()
            self.ledger = Ledger(group, device=hidden_TD.device)
            self._made = (
                SharedBatch(self._plan, self.ledger),
                AllToAllDispatcher(self._plan, self.ledger),
            )
        shared, alltoall = self._made
        rows = Rows(hidden_TD, top_k_index_TK, top_k_weights_TK)
        if self._theirs.shares_batch:
            return shared.run(0, rows, self._compute)
        here, state = alltoall.dispatch(0, rows, [])
        computed = (
            self._compute(here.hidden, here.index, here.weights) if len(here) else here.hidden
        )
        return alltoall.combine(computed, state)

    def _compute(
        self, hidden_TD: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """transformers' experts, which know local ids, and as many as an id that asks for none."""
        local = index_TK - self._plan.rank * self._num_local
        local = local.masked_fill((local < 0) | (local >= self._num_local), self._num_local)
        output: torch.Tensor = self._theirs.experts_forward(hidden_TD, local, weights_TK)
        return output.to(hidden_TD.dtype)
