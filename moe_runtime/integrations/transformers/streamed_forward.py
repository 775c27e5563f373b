"""Passes whose expert weights are read ahead, layer by layer."""

import torch

from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.engine import ExpertEngine
from moe_runtime.integrations.transformers.handle import Handle
from moe_runtime.offline.engine import Forward
from moe_runtime.offline.layer_stream import LayerStream
from moe_runtime.offline.pass_scheduler import PassPlan

# A token uses k of E experts: from E / k times so many tokens on, a pass uses nearly all of them.
_TOKENS_FOR_ALL = 3


class StreamedForward:
    """A forward that streams weights ahead while its passes use nearly all of them."""

    def __init__(self, forward: Forward, owner: Handle, policy: ScanPolicy) -> None:
        self.owner = owner
        self._forward = forward
        self._stream: LayerStream | None = None
        experts = [site.num_experts for site in owner.sites]
        self._tokens_for_all = _TOKENS_FOR_ALL * max(
            site.num_experts / site.top_k for site in owner.sites
        )
        if isinstance(owner.engine, ExpertEngine) and not owner.budget.holds_all:
            self._stream = LayerStream(owner.engine.cache, policy, experts)
            owner.engine.planner = self._stream

    @property
    def read_bytes(self) -> int:
        return self._forward.read_bytes

    @property
    def stall_seconds(self) -> float:
        return self._forward.stall_seconds

    def run(self, plan: PassPlan) -> torch.Tensor:
        if self._stream is not None:
            self._stream.is_on = plan.num_tokens >= self._tokens_for_all
        return self._forward.run(plan)
