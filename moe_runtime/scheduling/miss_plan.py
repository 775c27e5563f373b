"""Decides for each missing expert of a layer: copy it to the device, or compute it on the CPU.

Data: missing experts i with n_i tokens, each in host memory or on disk; the j-th read of the disk
ends at j * r. c: seconds of a copy. g(n), p(n): seconds of an expert on the device, on the CPU.
G: seconds of the experts that the device already holds.
Variables: the set S of experts to copy; the others are computed on the CPU.
Objective: the least makespan, max(F(S), P(S)).
  F(S): a flow shop of two machines: the link copies one expert after the other, the device computes
  each after its copy, and first the experts that it holds. All copies take equally long, so the
  order of falling g is optimal (Johnson, 1954, "Optimal two- and three-stage production
  schedules"); experts on disk come behind, in the order of their reads.
  P(S) = sum of p(n_i) over i not in S, later where the disk is.
Assumes that CPU, link and device do not slow each other down; `MissPlanner` corrects for that by
what it measures.
"""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from moe_runtime.scheduling.miss_costs import MissCosts

# Assignments tried one by one: planning must cost little beside a copy, and each takes some
# microseconds. Beyond, only those that copy the experts with most tokens.
_MAX_EXACT = 64


class MissWay(StrEnum):
    """How experts that the device lacks are computed."""

    AUTO = "auto"
    COPY = "copy"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Miss:
    """One missing expert."""

    expert: int
    num_tokens: int
    is_on_disk: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MissPlan:
    """`copied` in the order of their copies, `computed` in that in which the CPU takes them."""

    copied: tuple[Miss, ...]
    computed: tuple[Miss, ...]
    seconds: float  # predicted; 0 where nothing was measured yet

    @property
    def order(self) -> tuple[int, ...]:
        """Experts in the order in which they are needed in host memory: copies go first."""
        both = (*self.copied, *self.computed)
        return tuple(miss.expert for miss in sorted(both, key=lambda miss: miss.is_on_disk))


def plan_misses(misses: Sequence[Miss], held_tokens: Sequence[int], costs: MissCosts) -> MissPlan:
    """The plan of least predicted makespan.

    Optimal over all assignments and orders for few misses in host memory; with experts on disk,
    over all assignments; for many misses (more than 64 assignments that differ), over those that
    copy a number of the experts with most tokens. Among equals the one that copies more, which
    later layers gain from.
    """
    race = _Race.of(misses, held_tokens, costs)
    best = min(_assignments(race), key=lambda copied: (race.seconds(copied), -sum(copied)))
    return race.plan(best)


def plan_all(
    misses: Sequence[Miss], held_tokens: Sequence[int], costs: MissCosts, *, is_copied: bool
) -> MissPlan:
    """The plan that treats all alike."""
    race = _Race.of(misses, held_tokens, costs)
    return race.plan([is_copied] * len(misses))


def in_order(misses: Sequence[Miss], costs: MissCosts) -> list[Miss]:
    """In host memory first, and there by Johnson's rule; the disk reads in this order too."""
    seconds = {n: costs.device.seconds(n) for n in {miss.num_tokens for miss in misses}}

    def rank(miss: Miss) -> tuple[bool, float, int, int]:
        return miss.is_on_disk, -seconds[miss.num_tokens], -miss.num_tokens, miss.expert

    return sorted(misses, key=rank)


@dataclass(frozen=True, slots=True)
class _Race:
    """The misses in order, and what each costs: arrival in host memory, device and host seconds."""

    ordered: list[Miss]
    times: list[tuple[float, float, float]]
    copy_seconds: float
    held_seconds: float

    @classmethod
    def of(cls, misses: Sequence[Miss], held_tokens: Sequence[int], costs: MissCosts) -> "_Race":
        ordered = in_order(misses, costs)
        both = {
            n: (costs.device.seconds(n), costs.host.seconds(n))
            for n in {miss.num_tokens for miss in misses}
        }
        times, disk_end = [], 0.0
        for miss in ordered:
            if miss.is_on_disk:
                disk_end += costs.read.value
            times.append((disk_end if miss.is_on_disk else 0.0, *both[miss.num_tokens]))
        held_seconds = sum(map(costs.device.seconds, held_tokens))
        return cls(ordered, times, costs.copy.value, held_seconds)

    def ends(self, copied: Sequence[bool]) -> tuple[float, float]:
        """When the device is done, and when the CPU is."""
        link_end = cpu_end = 0.0
        device_end, copy_seconds = self.held_seconds, self.copy_seconds
        for is_copied, (arrival, device_seconds, host_seconds) in zip(
            copied, self.times, strict=True
        ):
            if is_copied:
                link_end = (arrival if arrival > link_end else link_end) + copy_seconds
                device_end = (link_end if link_end > device_end else device_end) + device_seconds
            else:
                cpu_end = (arrival if arrival > cpu_end else cpu_end) + host_seconds
        return device_end, cpu_end

    def seconds(self, copied: Sequence[bool]) -> float:
        """The makespan."""
        return max(self.ends(copied))

    def plan(self, copied: Sequence[bool]) -> MissPlan:
        pairs = list(zip(self.ordered, copied, strict=True))
        return MissPlan(
            copied=tuple(miss for miss, is_copied in pairs if is_copied),
            computed=tuple(miss for miss, is_copied in pairs if not is_copied),
            seconds=self.seconds(copied),
        )


def _assignments(race: _Race) -> Iterator[list[bool]]:
    """Which to copy. Experts with as many tokens in the same place are interchangeable."""
    alike = itertools.groupby(race.ordered, key=lambda miss: (miss.is_on_disk, miss.num_tokens))
    sizes = [len(list(group)) for _, group in alike]
    if math.prod(size + 1 for size in sizes) <= _MAX_EXACT:
        for counts in itertools.product(*(range(size + 1) for size in sizes)):
            yield [i < n for n, size in zip(counts, sizes, strict=True) for i in range(size)]
        return
    by_tokens = sorted(range(len(race.ordered)), key=lambda i: -race.ordered[i].num_tokens)
    place = {i: n for n, i in enumerate(by_tokens)}

    def first(count: int) -> list[bool]:
        return [place[i] < count for i in range(len(race.ordered))]

    # One more copy ends the device no sooner and the CPU no later: the best is where they meet.
    counts_up = range(len(race.ordered) + 1)
    meeting = bisect.bisect_left(counts_up, True, key=lambda n: _is_device_last(race, first(n)))
    yield from (first(n) for n in {max(meeting - 1, 0), min(meeting, len(race.ordered))})


def _is_device_last(race: _Race, copied: Sequence[bool]) -> bool:
    device_end, cpu_end = race.ends(copied)
    return device_end >= cpu_end
