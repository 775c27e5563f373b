"""Turns, gates and memory of one residency become the rows of its table."""

import numpy as np

from moe_runtime.errors import ContestantError
from moe_runtime.measure.bench.contestant_process import Turn
from moe_runtime.measure.bench.gate import Gate
from moe_runtime.measure.bench.report import Ceiling, Outcome, Row
from moe_runtime.measure.bench.sitting import Seat
from moe_runtime.measure.peers.catalog import Contestant
from moe_runtime.measure.spread import Spread


def measured_row(
    seat: Seat,
    variant: str,
    turns: list[Turn],
    gate: Gate,
    ours: list[Turn] | None,
    *,
    may_compare: bool,
) -> Row:
    """The row of a contestant that finished; `turns` and `ours` are the counted rounds.

    No speed on a red gate, and no ratio without equal memory or without ours.
    """
    contestant = seat.contestant
    group = seat.process.group
    row_name, title = contestant.row_name(variant), contestant.row_title(variant)
    if not gate.is_green:
        return Row(
            name=row_name, title=title, outcome=Outcome.RED, gate=gate, facts=seat.facts,
            note=f"computes something else: {gate.text()}",
        )  # fmt: skip
    milliseconds = [ms for turn in turns for ms in turn.milliseconds]
    num_tokens = len(milliseconds)
    times_ours = None
    if may_compare and ours is not None and ours is not turns:
        times_ours = Spread.of(
            [theirs.mean_ms / our.mean_ms for theirs, our in zip(turns, ours, strict=True)]
        )
    counters = _summed(turns)
    hits, misses = counters.get("hits", 0), counters.get("misses", 0)
    missed_bytes = misses * int(seat.facts.get("slot_bytes", 0))
    return Row(
        name=row_name,
        title=title,
        outcome=Outcome.MEASURED,
        ms_per_token=Spread.of(milliseconds),
        num_tokens=num_tokens,
        times_ours=times_ours,
        bytes_read_per_token=sum(turn.bytes_read for turn in turns) / num_tokens,
        gate=gate,
        own_bytes=seat.own_bytes,
        cap_bytes=seat.cap_bytes,
        peak_memory_bytes=None if group is None else group.peak_bytes(),
        peak_resident_bytes=seat.process.peak_resident_bytes(),
        hit_rate=hits / (hits + misses) if hits + misses else None,
        bytes_missed_per_token=missed_bytes / num_tokens if hits + misses else None,
        bytes_read_over_missed=counters["bytes_read"] / missed_bytes if missed_bytes else None,
        facts=seat.facts,
    )


def failed_row(contestant: Contestant, error: ContestantError) -> Row:
    """The row of a contestant that did not get to the end."""
    return Row(
        name=contestant.name,
        title=contestant.title,
        outcome=Outcome.TOO_LITTLE_MEMORY if error.is_memory else Outcome.FAILED,
        note=str(error),
    )


def ceiling_of(
    ours: list[Turn], no_experts: list[Turn], rates_gbps: list[float], *, slot_bytes: int
) -> Ceiling:
    """Round by round, as misses and the disk's rate differ from round to round."""
    limits = [
        turn.counters["misses"] / turn.num_tokens * slot_bytes / rate_gbps / 1e6 + dense.mean_ms
        for turn, dense, rate_gbps in zip(ours, no_experts, rates_gbps, strict=True)
    ]
    ratios = [turn.mean_ms / limit for turn, limit in zip(ours, limits, strict=True)]
    return Ceiling(ms_per_token=Spread.of(limits), ratio=Spread.of(ratios))


def mean_ms(turns: list[Turn]) -> float:
    """Over all tokens of `turns`."""
    return float(np.mean([ms for turn in turns for ms in turn.milliseconds]))


def _summed(turns: list[Turn]) -> dict[str, int]:
    names = {name for turn in turns for name in turn.counters}
    return {name: sum(turn.counters.get(name, 0) for turn in turns) for name in names}
