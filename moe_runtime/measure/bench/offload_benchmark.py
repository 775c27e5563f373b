"""Ours and the peers decode one model with part of its experts in memory."""

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from moe_runtime.errors import BudgetError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.integrations.transformers.budget import device_available_bytes
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.measure.bench.disk_rate import DiskRate
from moe_runtime.measure.bench.link_rate import LinkRate
from moe_runtime.measure.bench.memory_group import memory_groups
from moe_runtime.measure.bench.one_table import Found, OneTable
from moe_runtime.measure.bench.report import Comparison, Table
from moe_runtime.measure.bench.rounds import Schedule, take_turns
from moe_runtime.measure.bench.settings import Progress, Settings
from moe_runtime.measure.inspection import Inspection, inspect_model
from moe_runtime.measure.peers.device_memory import SLACK_BYTES
from moe_runtime.measure.probe.gpu_rate import gpu_device
from moe_runtime.measure.random_read import RandomReads

# transformers holds every weight, and a little more.
_REFERENCE_BYTES = 2**30


def run_offload_benchmark(
    settings: Settings, progress: Progress
) -> tuple[list[Table], list[Comparison]]:
    """A table for each residency and routing, one residency after the other.

    Contestants are processes of their own, alive together and taking turns, those of all routings
    with each other: a disk changes its rate within minutes, and routings are compared. Raises
    BudgetError when the machine cannot hold the references, which need all weights.
    """
    inspection = inspect_model(settings.checkpoint)
    _check_memory(inspection, settings)
    tables, comparisons = [], []
    for residency in settings.residencies:
        found = _measure(
            [
                OneTable(settings, inspection, residency, routing, progress)
                for routing in settings.routings
            ],
            settings,
            progress,
            is_short=residency < 1,
        )
        tables += [one.table for one in found]
        comparisons += [
            comparison
            for pair in pairwise(found)
            if (comparison := _compare(*pair, residency)) is not None
        ]
    return tables, comparisons


def _measure(
    tables: list[OneTable], settings: Settings, progress: Progress, *, is_short: bool
) -> list[Found]:
    config = resolve_model(settings.checkpoint).config.get_text_config()
    schedule = Schedule.of(
        num_steps=settings.num_steps,
        seconds=settings.seconds * len(tables),
        num_lanes=sum(table.num_lanes for table in tables),
        vocab_size=config.vocab_size,
    )
    with ExitStack() as stack:
        # Groups can go once the processes in them have ended, so they are opened first.
        is_on_cpu = settings.device.type == "cpu"
        groups = stack.enter_context(memory_groups()) if is_on_cpu else None
        lanes = [lane for table in tables for lane in table.start(stack, groups, schedule)]
        rate: DiskRate | LinkRate | None = None
        if is_short and not is_on_cpu:
            rate = LinkRate(gpu_device(settings.device.index or 0, None))
        elif is_short:
            files = sorted(settings.checkpoint.glob("*.safetensors"))
            reads = stack.enter_context(RandomReads(files))
            # Without O_DIRECT the rate says nothing of what a miss costs: no ceiling then.
            if reads.is_direct:
                rate = DiskRate(reads, num_trial_rounds=schedule.first_counted)
        progress.on_stage(f"{schedule.num_rounds} rounds")
        measured = take_turns(lanes, schedule, rate, progress.on_round)
        return [table.finish(measured) for table in tables]


def describe_model(checkpoint: Path) -> dict[str, Any]:
    """What the report says of the model."""
    found = inspect_model(checkpoint)
    return {
        "name": checkpoint.name,
        "family": found.family,
        "dtype": found.dtype,
        "layers": found.num_moe_layers,
        "experts_per_layer": found.experts_per_layer,
        "top_k": found.top_k,
        "expert_bytes": found.expert_bytes,
        "expert_total_bytes": found.expert_total_bytes,
        "dense_bytes": found.dense_bytes,
        "checkpoint_bytes": found.checkpoint_bytes,
    }


def _compare(first: Found, second: Found, residency: float) -> Comparison | None:
    if None in (first.ours_ms, second.ours_ms, first.predicted_ms, second.predicted_ms):
        return None
    assert first.ours_ms is not None
    assert second.ours_ms is not None
    assert first.predicted_ms is not None
    assert second.predicted_ms is not None
    return Comparison(
        residency=residency,
        slow=first.table.routing,
        fast=second.table.routing,
        measured=first.ours_ms / second.ours_ms,
        predicted=first.predicted_ms / second.predicted_ms,
    )


def _check_memory(inspection: Inspection, settings: Settings) -> None:
    num_routings = len(settings.routings)
    needed = num_routings * (inspection.checkpoint_bytes + _REFERENCE_BYTES)
    free = psutil.virtual_memory().available
    if settings.device.type != "cpu":
        # Beside the reference, everybody's share is there at the same time.
        share = max(settings.residencies) * inspection.checkpoint_bytes + SLACK_BYTES
        needed += int(num_routings * (1 + len(settings.peers)) * share)
        free = device_available_bytes(settings.device)
    if needed > free:
        raise BudgetError(
            "the reference, unmodified transformers for each routing, and who is beside it need "
            f"about {format_bytes(needed)} and {format_bytes(free)} are free on {settings.device}; "
            "take fewer --layers or --peers, or end other programs"
        )
