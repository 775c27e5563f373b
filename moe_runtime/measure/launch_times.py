"""How long kernels were launched before they ran, and from which batch size on they queue.

SKIP (arXiv 2504.11750, ISPASS'25): TKLQT, the total kernel launch and queue time, is the sum over
kernels of the time from the call that launches one to its begin on the device. While the host
cannot launch as fast as the device computes, it is the launches' own and does not depend on the
batch; once the device is the slower one, kernels queue and it grows. The batch size at which that
begins is the transition from host-bound to device-bound.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_runtime.measure.profiler_events import KERNEL, LAUNCHES, ProfilerEvent, of_category

# Launch times of one program vary by some ten percent from run to run; a queue makes them several
# times as long within one or two doublings of the batch.
_GROWTH = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """All runs of one kernel. `queue_seconds` passed between their launches and their begins."""

    name: str
    num: int
    queue_seconds: float
    seconds: float


def kernel_times(events: Sequence[ProfilerEvent]) -> list[KernelTime]:
    """By kernel, the longest first. Kernels whose launch is not among `events` are left out."""
    launched = {
        event.correlation: event.begin
        for event in of_category(events, *LAUNCHES)
        if event.correlation is not None
    }
    totals: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in of_category(events, KERNEL):
        if event.correlation in launched:
            found = totals[event.name]
            found[0] += 1
            # Two clocks are compared: a kernel cannot begin before its launch.
            found[1] += max(0.0, event.begin - launched[event.correlation])
            found[2] += event.seconds
    times = [
        KernelTime(name=name, num=int(num), queue_seconds=queue, seconds=seconds)
        for name, (num, queue, seconds) in totals.items()
    ]
    return sorted(times, key=lambda each: -each.seconds)


def tklqt_seconds(kernels: Sequence[KernelTime]) -> float:
    """The paper's TKLQT."""
    return sum(kernel.queue_seconds for kernel in kernels)


def transition_batch(tklqt_of_batch: Mapping[int, float]) -> int | None:
    """The knee: the smallest batch from which on TKLQT stays half as large again, or more, as the
    least of smaller batches. None where there is none among these batches."""
    batches = sorted(tklqt_of_batch)
    knee = None
    for index in range(len(batches) - 1, 0, -1):
        least = min(tklqt_of_batch[batch] for batch in batches[:index])
        if not all(tklqt_of_batch[batch] > _GROWTH * least for batch in batches[index:]):
            break
        knee = batches[index]
    return knee
