"""Passes whose expert weights are read ahead, layer by layer."""

from collections.abc import Callable

import torch

from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.engine import ExpertEngine
from moe_runtime.expert_memory import format_bytes
from moe_runtime.integrations.transformers.handle import Handle
from moe_runtime.offline.engine import Forward
from moe_runtime.offline.layer_stream import LayerStream, reads_ahead
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

    def run(self, plan: PassPlan) -> torch.Tensor:
        if self._stream is not None:
            self._stream.is_on = plan.num_tokens >= self._tokens_for_all
        return self._forward.run(plan)


def turn_listener(owner: Handle, policy: ScanPolicy) -> Callable[[int], None]:
    """Tells cache and engine how many groups of a pass have a layer still to come."""
    engine = owner.engine
    assert isinstance(engine, ExpertEngine)

    def on_turn(groups_to_come: int) -> None:
        policy.groups_to_come = engine.groups_to_come = groups_to_come

    return on_turn


def why_one_group(owner: Handle) -> str:
    """Why the groups of a pass would ask for weights twice, or nothing where they would not."""
    if owner.report()["memory"]["dense_window"] is not None:
        return "dense layers are read in every pass (--dense-memory), and would be for each group"
    if not isinstance(owner.engine, ExpertEngine) or not all(site.is_fused for site in owner.sites):
        return "its layers ask for their experts one by one"
    most = max(site.num_experts for site in owner.sites)
    budget, least = owner.budget, most + reads_ahead(most)
    if budget.holds_all or budget.num_slots >= least:
        return ""
    return (
        f"{budget.num_slots} slots hold fewer than the {least} experts of a layer and of what is "
        "read ahead, so that experts would be read for each group; set --expert-memory "
        f"{format_bytes(least * budget.slot_bytes)} or more"
    )
