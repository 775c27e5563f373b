"""DeepSpeed's MoE layers, run by our dispatch in their place."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.parallel.alltoall import AllToAllDispatcher
from moe_runtime.parallel.dispatcher import Dispatcher
from moe_runtime.parallel.gates import Routing, SoftmaxGate
from moe_runtime.parallel.ledger import Ledger
from moe_runtime.parallel.local import LocalDispatcher
from moe_runtime.parallel.moe_layer import Hooks, MoELayer
from moe_runtime.parallel.plan import ExpertPlan, linear_placement

_INNER = "deepspeed_moe"


def from_deepspeed(module: nn.Module, *, degree: int = 1, hooks: Hooks | None = None) -> nn.Module:
    """Make every `deepspeed.moe.layer.MoE` in `module`, or `module` itself, run ours; returns it.

    Same gate, experts, parameters and their names, and the same (output, l_aux, exp_counts), a
    residual expert included. A token travels once to each rank that holds one of its experts, where
    DeepSpeed sends every rank as many rows for each expert as the fullest one needs. `degree`
    chunks of tokens let messages and computing overlap; `hooks` run in every layer. For inference
    and for layers that drop nothing: raises UnsupportedModelError for `drop_tokens`, for
    `top2_2nd_expert_sampling` with k = 2, for Tutel and for tensor-parallel experts.
    """
    found = [(name, child) for name, child in module.named_modules() if _is_moe(child)]
    if not found:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no DeepSpeed MoE layer (deepspeed.moe.layer.MoE); give "
            "one, or a model that holds some"
        )
    if degree < 1:
        raise ValueError(f"degree is {degree}; a layer runs in 1 chunk or more")
    for name, layer in found:  # all are looked at before any is changed
        _check(name or type(layer).__name__, layer)
    for _, layer in found:
        setattr(layer, _INNER, DeepSpeedExperts(layer, degree, hooks or Hooks()))
    return module


class DeepSpeedExperts(nn.Module):
    """Stands where DeepSpeed's MOELayer stood, with its gate and its experts.

    `ledger` counts what it sent, None on one rank; `l_aux` and `exp_counts` are of the last call.
    """

    def __init__(self, layer: Any, degree: int, hooks: Hooks) -> None:
        super().__init__()
        theirs = layer.deepspeed_moe
        self.gate = theirs.gate
        self.experts = theirs.experts
        self.l_aux = torch.zeros(())
        self.exp_counts = torch.zeros(0, dtype=torch.int64)
        self.ledger: Ledger | None = None
        dispatcher: Dispatcher[Any] = LocalDispatcher()
        first = 0
        if layer.ep_size > 1:
            device = self.gate.wg.weight.device
            self.ledger = Ledger(theirs.ep_group, device=device)
            placement = linear_placement(
                model="", num_experts=layer.num_experts, num_layers=1, num_ranks=layer.ep_size
            )
            plan = ExpertPlan.of(placement, self.ledger.rank)
            first = self.ledger.rank * layer.num_local_experts
            dispatcher = AllToAllDispatcher(plan, self.ledger)
        local = self.experts.deepspeed_experts
        gate = SoftmaxGate(
            weight_ED=self.gate.wg.weight, top_k=self.gate.k, normalize=self.gate.k > 1
        )
        self._ours = MoELayer(
            gate=gate,
            experts={first + i: expert for i, expert in enumerate(local)},
            dispatcher=dispatcher,
            hooks=hooks,
            degree=degree,
        )

    def forward(self, x: torch.Tensor, used_token: torch.Tensor | None = None) -> torch.Tensor:
        """What MOELayer returns; sets `l_aux` and `exp_counts`."""
        if used_token is not None:
            raise UnsupportedModelError(
                "used_token leaves tokens out, which this layer does not; call it with the tokens "
                "that are used"
            )
        if self.ledger is not None and torch.is_grad_enabled():
            raise UnsupportedModelError(
                "a DeepSpeed layer run by moe_runtime has no backward between ranks; run it under "
                "torch.no_grad(), or train with DeepSpeed's own"
            )
        output, routing = self._ours.run(x)
        self.l_aux, self.exp_counts = _auxiliary(routing)
        return output


def _auxiliary(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """The balance loss as DeepSpeed scales it, and how often each expert was chosen, `[E]`."""
    top_k, num_experts = routing.index.shape[1], routing.scores.shape[1]
    chosen_TKE = functional.one_hot(routing.index, num_experts)
    # With k = 2 DeepSpeed's loss looks at the first choice alone, as GShard's.
    seen_TE = chosen_TKE[:, 0] if top_k == 2 else chosen_TKE.sum(1)
    share_E = seen_TE.to(routing.scores.dtype).mean(0)
    l_aux = (routing.scores.mean(0) * share_E).sum() * num_experts
    return (l_aux / top_k if top_k > 2 else l_aux), chosen_TKE.sum((0, 1))


def _is_moe(module: nn.Module) -> bool:
    """By what it has: DeepSpeed need not be importable here, and its classes may be wrapped."""
    inner = getattr(module, _INNER, None)
    return (
        inner is not None
        and hasattr(getattr(inner, "gate", None), "wg")
        and hasattr(getattr(inner, "experts", None), "deepspeed_experts")
        and not isinstance(inner, DeepSpeedExperts)
    )


def _check(name: str, layer: Any) -> None:
    for why, remedy in _refusals(layer):
        raise UnsupportedModelError(f"DeepSpeed layer {name} {why}; {remedy}")


def _refusals(layer: Any) -> Iterator[tuple[str, str]]:
    inner = layer.deepspeed_moe
    gate = inner.gate
    if gate.drop_tokens:
        yield "drops tokens over its capacity", "build it with drop_tokens=False"
    if gate.k == 2 and gate.top2_2nd_expert_sampling:
        yield "draws second experts by chance", "build it with top2_2nd_expert_sampling=False"
    if getattr(inner, "use_tutel", False):
        yield "runs Tutel's kernels", "build it with use_tutel=False"
    if getattr(layer, "enable_expert_tensor_parallelism", False):
        yield (
            "splits single experts over ranks",
            "build it with enable_expert_tensor_parallelism=False",
        )
    if layer.ep_size > 1 and inner.ep_group is None:
        yield "has no process group yet", "call its set_deepspeed_parallelism() first"
