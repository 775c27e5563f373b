"""The first forwards of a run, kept in full within a fixed number of expert uses."""

from array import array
from collections.abc import Collection

from moe_runtime.expert import ExpertKey
from moe_runtime.recording.run_record import FirstForwards, Forward, Visit


class VisitLog:
    """Which experts every layer asked for, forward after forward, until `max_uses` are kept.

    A forward that would not fit ends the log: what is kept are whole forwards.
    """

    def __init__(self, max_uses: int) -> None:
        self._max_uses = max_uses
        self._experts = array("H")
        self._visits = array("L")  # forward, layer, number of experts, and so on
        self._forwards: list[Forward] = []
        self._kept = 0, 0  # lengths of the two at the end of the last whole forward
        self._is_full = False

    def add(self, layer: int, experts: Collection[int]) -> None:
        """A layer of the forward that runs asked for `experts`."""
        if self._is_full:
            return
        if len(self._experts) + len(experts) > self._max_uses:
            self._is_full = True
            return
        self._experts.extend(experts)
        self._visits.extend((len(self._forwards), layer, len(experts)))

    def end(self, forward: Forward) -> None:
        """The forward that ran is over."""
        if not self._is_full:
            self._forwards.append(forward)
            self._kept = len(self._experts), len(self._visits)

    def drop(self) -> None:
        """The forward that ran failed."""
        num_experts, num_visits = self._kept
        del self._experts[num_experts:], self._visits[num_visits:]

    def kept(self) -> FirstForwards:
        """The whole forwards so far."""
        visits = []
        first = 0
        for start in range(0, self._kept[1], 3):
            forward, layer, num_experts = self._visits[start : start + 3]
            experts = self._experts[first : first + num_experts]
            first += num_experts
            keys = [ExpertKey(layer, expert) for expert in sorted(experts)]
            visits.append(Visit(keys=keys, forward=forward))
        return FirstForwards(
            forwards=list(self._forwards), visits=visits, is_whole=not self._is_full
        )
