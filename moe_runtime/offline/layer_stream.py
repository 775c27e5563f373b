"""Reads the next layer's experts while the current one computes, for passes that use them all."""

from collections.abc import Sequence

from moe_runtime.cache.cache import ExpertCache
from moe_runtime.cache.scan import ScanPolicy
from moe_runtime.expert import ExpertKey
from moe_runtime.scheduling.prefetch import AheadPlan

# Of a layer's experts: what is on its way takes slots from what could stay.
_SHARE_AHEAD = 0.25


class LayerStream:
    """A planner for `ExpertEngine`: streams weights ahead layer by layer, as MoE-Lens does.

    Only while `is_on`: few tokens use few experts, and reading the others would be for nothing.
    """

    def __init__(
        self, cache: ExpertCache, policy: ScanPolicy, num_experts_by_layer: Sequence[int]
    ) -> None:
        self.is_on = False
        self._cache = cache
        self._policy = policy
        self._num_experts = num_experts_by_layer

    def plan(self, num_in_line: int) -> AheadPlan | None:
        if not self.is_on:
            return None
        layer = (self._policy.layer + 1) % len(self._num_experts)
        keys = [ExpertKey(layer, expert) for expert in range(self._num_experts[layer])]
        most = reads_ahead(len(keys)) - num_in_line
        absent = [key for key in keys if key not in self._cache]
        if self._policy.groups_to_come:  # what they use of this layer must find room
            room = self._cache.num_slots - self._num_experts[self._policy.layer]
            most = min(most, room - (len(keys) - len(absent)))
        return AheadPlan(absent, most, self._is_worth) if most > 0 and absent else None

    def _is_worth(self, key: ExpertKey, victim: ExpertKey) -> bool:
        """Whatever is not of the next layer is needed later, but for a group still to come."""
        is_sooner = self._policy.groups_to_come and victim.layer == self._policy.layer
        return not is_sooner and victim.layer != key.layer


def reads_ahead(num_experts: int) -> int:
    """Experts of a layer of `num_experts` that may be on their way ahead of it."""
    return max(1, int(_SHARE_AHEAD * num_experts))
