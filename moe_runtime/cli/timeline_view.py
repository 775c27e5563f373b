"""Shows simulated timelines, for a person or a program."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from moe_runtime.simulate.timelines import TimelineResult


def timelines_as_dicts(results: "Sequence[TimelineResult]") -> list[dict[str, Any]]:
    """Totals in seconds; bytes in units of one expert's."""
    return [
        {
            "policy": result.policy,
            "slots": result.slots,
            "predictor": result.predictor,
            "prefetch": result.is_prefetching,
            "seconds": result.timeline.seconds,
            "stall_seconds": result.timeline.stall_seconds,
            "compute_seconds": result.timeline.compute_seconds,
            "disk_seconds": result.timeline.disk_seconds,
            "copy_seconds": result.timeline.copy_seconds,
            "perfect_prediction_seconds": result.perfect_prediction_seconds,
            "infinite_bandwidth_seconds": result.infinite_bandwidth_seconds,
            "num_steps": result.timeline.num_steps,
            "hits": result.timeline.hits,
            "misses": result.timeline.misses,
            "prefetches": result.timeline.prefetches,
            "wasted_prefetches": result.timeline.wasted,
            "bytes_fetched_experts": result.timeline.bytes_fetched_experts,
            "fetches_more_than_lru": _fetches_more_than_lru(result, results),
        }
        for result in results
    ]


def timeline_table(results: "Sequence[TimelineResult]", title: str) -> Table:
    """Milliseconds a step."""
    table = Table(title=title, title_justify="left")
    table.add_column("policy", no_wrap=True)
    for name in (
        "slots",
        "ms a step",
        "stall",
        "perfect prediction",
        "infinite bandwidth",
        "read",
        "ahead",
        "wasted",
    ):
        table.add_column(name, justify="right")
    for result in results:
        timeline = result.timeline
        name = (
            result.policy if result.predictor is None else f"{result.policy} + {result.predictor}"
        )
        seconds = (
            timeline.seconds,
            timeline.stall_seconds,
            result.perfect_prediction_seconds,
            result.infinite_bandwidth_seconds,
        )
        mark = " > lru" if _fetches_more_than_lru(result, results) else ""
        table.add_row(
            f"{name}, prefetch" if result.is_prefetching else name,
            f"{result.slots}",
            *(f"{1000 * each / timeline.num_steps:.2f}" for each in seconds),
            f"{timeline.bytes_fetched_experts}{mark}",
            f"{timeline.prefetches}",
            f"{timeline.wasted:.1f}",
        )
    return table


def _fetches_more_than_lru(
    result: "TimelineResult", results: "Sequence[TimelineResult]"
) -> bool | None:
    """Then hit rates do not compare, only bytes and time; None where lru is not there."""
    for other in results:
        if other.policy == "lru" and other.slots == result.slots:
            return result.timeline.bytes_fetched_experts > other.timeline.bytes_fetched_experts
    return None
