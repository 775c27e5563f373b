"""Plans the misses of every layer, and corrects itself by what the plans took."""

from collections.abc import Sequence

from moe_runtime.scheduling.miss_costs import MissCosts, MovingAverage
from moe_runtime.scheduling.miss_plan import (
    Miss,
    MissPlan,
    MissWay,
    in_order,
    plan_all,
    plan_misses,
)

# The other kind of plan must promise to be so much faster: measurements scatter by some percent,
# and a choice that flips with them learns from neither kind.
_GAIN_TO_SWITCH = 0.1
# Layers until the kind that was dropped gets another try, as the machine may have changed.
_LAYERS_TO_RETRY = 256


class MissPlanner:
    """Chooses between copying every missing expert and letting the CPU compute some.

    A prediction leaves out that CPU, link and device share memory. So each kind of plan carries the
    average of measured over predicted seconds, which its predictions are multiplied by: a kind
    that measures worse than it promises is dropped. Decisions follow from the order of layers
    and from the measurements handed in; nothing else is looked at.
    """

    def __init__(self, way: MissWay) -> None:
        self.way = way
        self.costs = MissCosts()
        self._stretch = {is_mixed: MovingAverage() for is_mixed in (False, True)}
        self._is_mixed = False
        self._layers_since = {False: 0, True: 0}

    def plan(
        self, misses: Sequence[Miss], held_tokens: Sequence[int], *, can_compute: bool = True
    ) -> MissPlan:
        """The plan of one layer with `misses`; `held_tokens` of experts that the device holds."""
        if self.way is MissWay.COPY or not can_compute or not misses:
            return plan_all(misses, held_tokens, self.costs, is_copied=True)
        if self.way is MissWay.CPU:
            return plan_all(misses, held_tokens, self.costs, is_copied=False)
        if not (self.costs.copy.num_samples and self.costs.host.is_known):
            return self._first_try(misses)
        copying = plan_all(misses, held_tokens, self.costs, is_copied=True)
        best = plan_misses(misses, held_tokens, self.costs)
        if not best.computed:  # promises nothing, so it says nothing about that kind
            return copying
        self._choose(copying.seconds, best.seconds)
        return best if self._is_mixed else copying

    def stall_seconds(self, plan: MissPlan, tokens: Sequence[int]) -> float:
        """By how much `plan` ends later than with all experts, of so many `tokens`, held."""
        return max(0.0, plan.seconds - sum(map(self.costs.device.seconds, tokens)))

    def observe(self, plan: MissPlan, seconds: float) -> None:
        """A layer with `plan` took `seconds`."""
        if plan.seconds > 0:
            self._stretch[bool(plan.computed)].add(seconds / plan.seconds)

    def _first_try(self, misses: Sequence[Miss]) -> MissPlan:
        """One expert goes the way that was never measured: to the CPU the one with least to do."""
        ordered = in_order(misses, self.costs)
        computed: list[Miss] = []
        if self.costs.copy.num_samples or len(ordered) > 1:
            lightest = min(ordered, key=lambda m: (m.is_on_disk, m.num_tokens, m.expert))
            ordered.remove(lightest)
            computed = [lightest]
        return MissPlan(copied=tuple(ordered), computed=tuple(computed), seconds=0.0)

    def _choose(self, copying_seconds: float, mixed_seconds: float) -> None:
        expected = {
            False: copying_seconds * self._factor(False),
            True: mixed_seconds * self._factor(True),
        }
        other = not self._is_mixed
        is_due = self._layers_since[other] >= _LAYERS_TO_RETRY
        if is_due or expected[other] < (1 - _GAIN_TO_SWITCH) * expected[self._is_mixed]:
            self._is_mixed = other
        self._layers_since[not self._is_mixed] += 1
        self._layers_since[self._is_mixed] = 0

    def _factor(self, is_mixed: bool) -> float:
        stretch = self._stretch[is_mixed]
        return stretch.value if stretch.num_samples else 1.0
