"""DeepSpeed's MoE layer where it is installed, and a stand-in with its attributes elsewhere.

T tokens, K top-k, E experts, D model dim.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.nn import functional

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
KINDS = ("stand-in", "deepspeed")
D, E = 8, 8


class Expert(nn.Module):
    """A small MLP; returns a bias beside its output, as Megatron's do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, 12)
        self.down = nn.Linear(12, D)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.down(torch.tanh(self.up(x))), self.down.bias


class StandInGate(nn.Module):
    """The attributes of DeepSpeed's TopKGate that say what a gate does."""

    def __init__(self, top_k: int, *, drop_tokens: bool, sampling: bool) -> None:
        super().__init__()
        self.wg = nn.Linear(D, E, bias=False)
        self.k = top_k
        self.drop_tokens = drop_tokens
        self.top2_2nd_expert_sampling = sampling


class StandInExperts(nn.Module):
    """DeepSpeed's list of this rank's experts."""

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(Expert() for _ in range(num_local))


class StandInInner(nn.Module):
    """DeepSpeed's MOELayer on one rank: every expert for every token."""

    def __init__(self, gate: StandInGate, experts: StandInExperts) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.ep_group: Any = None
        self.use_tutel = False

    def forward(self, x: torch.Tensor, used_token: torch.Tensor | None = None) -> torch.Tensor:
        x_TD = x.reshape(-1, D)
        scores = functional.linear(x_TD.float(), self.gate.wg.weight.float()).softmax(1)
        order = scores.argsort(1, descending=True)[:, : self.gate.k]
        chosen = torch.zeros_like(scores).scatter_(1, order, 1)
        weights = scores * chosen
        if self.gate.k > 1:
            weights = weights / weights.sum(1, keepdim=True)
        seen = chosen
        if self.gate.k == 2:
            seen = torch.zeros_like(scores).scatter_(1, order[:, :1], 1)
        # top1gating: sum(me * ce) E; top2gating: mean(me * ce) E^2; topkgating: that over k
        self.l_aux = (
            (scores.mean(0) * seen.mean(0)).sum() * E / max(self.gate.k - (self.gate.k < 3), 1)
        )
        self.exp_counts = chosen.sum(0).long()
        outputs = torch.stack([e(x_TD)[0] for e in self.experts.deepspeed_experts], 1)
        return (outputs * weights.unsqueeze(2)).sum(1).reshape(x.shape)


class StandIn(nn.Module):
    """DeepSpeed's MoE, on one rank."""

    def __init__(self, top_k: int, *, residual: bool, drop_tokens: bool, sampling: bool) -> None:
        super().__init__()
        self.use_residual = residual
        self.enable_expert_tensor_parallelism = False
        self.ep_size = 1
        self.num_experts = self.num_local_experts = E
        gate = StandInGate(top_k, drop_tokens=drop_tokens, sampling=sampling)
        self.deepspeed_moe = StandInInner(gate, StandInExperts(E))
        if residual:
            self.mlp = Expert()
            self.coefficient = nn.Linear(D, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = self.deepspeed_moe(x, None)
        if self.use_residual:
            share = self.coefficient(x).softmax(-1)
            output = output * share[..., :1] + self.mlp(x)[0] * share[..., 1:]
        return output, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


def make_layer(
    kind: str,
    top_k: int,
    *,
    residual: bool = False,
    drop_tokens: bool = False,
    sampling: bool = False,
    ep_size: int = 1,
) -> Any:
    """A layer whose weights are those of this seed, experts by their number among all."""
    torch.manual_seed(0)
    if kind == "stand-in":
        return StandIn(top_k, residual=residual, drop_tokens=drop_tokens, sampling=sampling).eval()
    from deepspeed.moe.layer import MoE

    layer = MoE(
        D,
        Expert(),
        num_experts=E,
        ep_size=ep_size,
        k=top_k,
        min_capacity=0,
        use_residual=residual,
        drop_tokens=drop_tokens,
        use_rts=False,
        top2_2nd_expert_sampling=sampling,
    ).eval()
    layer.set_deepspeed_parallelism()
    local = layer.deepspeed_moe.experts.deepspeed_experts
    first = torch.distributed.get_rank(layer.deepspeed_moe.ep_group) * len(local)
    for number, expert in enumerate(local):
        draw = torch.Generator().manual_seed(first + number)
        for parameter in expert.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) / 3
    return layer
