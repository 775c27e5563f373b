"""Megatron-Core's router traces: a JSON line for each step and layer (main, 2026)."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.trace import Trace

Array = np.ndarray[Any, Any]

_DECODER = "decoder"


def read_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """The decoder's tokens of one `router_trace_rank<N>.jsonl`.

    Layers that predict further tokens (block `mtp`) are left out. A layer that comes twice in a
    step routed the next micro-batch. Nothing tells requests apart, so all rows are one sequence.
    The order of a token's experts may be that of their ids: Megatron reads them off a routing map.
    """
    batches: dict[tuple[int, int], dict[int, Array]] = defaultdict(dict)
    seen: dict[tuple[int, int], int] = defaultdict(int)
    for where, record in _records(path):
        step, layer, experts = _routing(record, where)
        micro_batch = seen[step, layer]
        seen[step, layer] += 1
        batches[step, micro_batch][layer] = experts
    if not batches:
        raise TraceError(
            f"{path} holds no routing of decoder layers; record with --moe-routing-trace-path"
        )
    layers = sorted({layer for batch in batches.values() for layer in batch})
    blocks, steps = [], []
    for number, ((step, micro_batch), batch) in enumerate(sorted(batches.items())):
        shapes = {experts.shape for experts in batch.values()}
        if len(shapes) > 1 or len(batch) != len(layers):
            raise TraceError(
                f"{path}: step {step}, micro-batch {micro_batch} has shapes {sorted(shapes)} in "
                f"{len(batch)} of {len(layers)} layers, so tokens cannot be followed; record with "
                "one pipeline stage, and remove a step that was cut short"
            )
        blocks.append(np.stack([batch[layer] for layer in layers], axis=1))
        steps.append(np.full(len(blocks[-1]), number))
    fields = {
        "topk": np.concatenate(blocks), "step": np.concatenate(steps),
        "layer_ids": np.array(layers),
    }  # fmt: skip
    return Trace.of(fields, source=str(path), num_experts=num_experts)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise TraceError(
                        f"{where} is not JSON ({error}); remove it if it was cut short"
                    ) from error
                if not isinstance(record, dict):
                    raise TraceError(f"{where} is no object; it is no router trace of Megatron")
                if record.get("block", _DECODER) == _DECODER:
                    yield where, record
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError:
        raise TraceError(f"{path} is not UTF-8 text; it is no router trace of Megatron") from None


def _routing(record: dict[str, Any], where: str) -> tuple[int, int, Array]:
    """Step, layer and `[T, K]` experts."""
    step, layer, rows = (record.get(name) for name in ("step", "layer", "top_indices"))
    if type(step) is not int or type(layer) is not int or not isinstance(rows, list):
        raise TraceError(f"{where} lacks step, layer or top_indices; record it again")
    experts: Array = np.zeros(0)
    with suppress(ValueError, TypeError, OverflowError):
        experts = np.array(rows, np.int64)
    if experts.ndim != 2 or experts.shape != (record.get("num_tokens"), record.get("topk")):
        raise TraceError(
            f"{where}: top_indices must be whole numbers, [num_tokens, topk], which are "
            f"{record.get('num_tokens')} and {record.get('topk')}; record it again"
        )
    return step, layer, experts
