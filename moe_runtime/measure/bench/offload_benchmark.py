"""Ours and the peers decode one model with part of its experts in memory."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from moe_runtime.errors import BudgetError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.measure.bench.one_table import Found, OneTable
from moe_runtime.measure.bench.report import Comparison, Table
from moe_runtime.measure.bench.settings import Progress, Settings
from moe_runtime.measure.inspection import Inspection, inspect_model

# transformers holds every weight, and a little more.
_REFERENCE_BYTES = 2**30


def run_offload_benchmark(
    settings: Settings, progress: Progress
) -> tuple[list[Table], list[Comparison]]:
    """A table for each residency and routing, one after the other.

    Contestants are processes of their own, alive together and taking turns. Raises BudgetError when
    the machine cannot hold the reference, which needs all weights.
    """
    inspection = inspect_model(settings.checkpoint)
    _check_memory(inspection)
    tables, comparisons = [], []
    for residency in settings.residencies:
        found = [
            OneTable(settings, inspection, residency, routing, progress).run()
            for routing in settings.routings
        ]
        tables += [one.table for one in found]
        comparisons += [
            comparison
            for pair in pairwise(found)
            if (comparison := _compare(*pair, residency)) is not None
        ]
    return tables, comparisons


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


def _check_memory(inspection: Inspection) -> None:
    needed = inspection.checkpoint_bytes + _REFERENCE_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        raise BudgetError(
            f"the reference, unmodified transformers, needs about {format_bytes(needed)} and "
            f"{format_bytes(free)} are free; take fewer --layers, or end other programs"
        )
