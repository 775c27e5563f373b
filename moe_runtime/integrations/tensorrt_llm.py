"""TensorRT-LLM's configuration of slots and its statistics of experts (1.x)."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from moe_runtime.config import write_whole
from moe_runtime.errors import PlacementError, TraceError
from moe_runtime.integrations.placement_hints import PlacementHints
from moe_runtime.placement_map import Placement, integer_table
from moe_runtime.trace import Trace

Array = np.ndarray[Any, Any]

_ASSIGNMENTS = "initial_global_assignments"
_RAW_NAME = re.compile(r"rank\d+_raw\.safetensors")
_KEY = re.compile(r"(\d+)_(\d+)")
_INTEGERS = "iu"


def write_placement(placement: Placement, path: Path) -> None:
    """A YAML file for moe_config.load_balancer: a line a layer, under the layer's own number."""
    rows = zip(placement.layer_ids, placement.slots, strict=True)
    lines = "".join(f"  {layer}: {row.tolist()}\n" for layer, row in rows)
    write_whole(
        path,
        f"num_slots: {placement.num_slots}\nlayer_updates_per_iter: 0\n{_ASSIGNMENTS}:\n{lines}",
    )


def read_placement(path: Path, hints: PlacementHints) -> Placement:
    """A moe_load_balancer.yaml. How many ranks share its slots it does not say."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlacementError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PlacementError(f"{path} is not sound YAML: {reason}; write it again") from error
    rows = found.get(_ASSIGNMENTS) if isinstance(found, dict) else None
    if not isinstance(rows, dict) or not rows or not all(type(key) is int for key in rows):
        raise PlacementError(
            f"{path} has no {_ASSIGNMENTS} from layers to slots; it is no load balancer of "
            "TensorRT-LLM"
        )
    layers = sorted(rows)
    slots = integer_table([rows[layer] for layer in layers], f"{path}: {_ASSIGNMENTS}")
    if found.get("num_slots") != slots.shape[1]:
        raise PlacementError(
            f"{path}: num_slots is {found.get('num_slots')}, and layer {layers[0]} has "
            f"{slots.shape[1]}; make them equal"
        )
    return hints.placement(slots, source=str(path), format_name="tensorrt-llm", layer_ids=layers)


def read_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """The tokens of one rank's `rank<N>_raw.safetensors`, beside its `meta_info.json`.

    Nothing tells requests apart, so all rows are one sequence. `rank<N>.safetensors`, which every
    version writes, holds counts and no tokens.
    """
    if not _RAW_NAME.fullmatch(path.name):
        raise TraceError(
            f"{path} is no rank<N>_raw.safetensors; other statistics of TensorRT-LLM hold counts "
            "of experts and no tokens; record with a version that writes it, or let TensorRT-LLM's "
            "generate_eplb_config.py balance by these counts alone"
        )
    try:
        arrays = load_file(path)
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read: {error.strerror or error}; check the path"
        ) from error
    except SafetensorError as error:
        raise TraceError(f"{path} is damaged ({error}); record it again") from error
    forwards = _forwards(arrays, path)
    layers = sorted({layer for forward in forwards.values() for layer in forward})
    blocks, steps = [], []
    for step in sorted(forwards):
        forward = forwards[step]
        shapes = {array.shape for array in forward.values()}
        if len(shapes) > 1 or len(forward) != len(layers):
            raise TraceError(
                f"{path}: iteration {step} has shapes {sorted(shapes)} in {len(forward)} of "
                f"{len(layers)} layers, so tokens cannot be followed; leave out "
                "EXPERT_STATISTIC_ITER_RANGE's first and last iteration, or record again"
            )
        blocks.append(np.stack([forward[layer] for layer in layers], axis=1))
        steps.append(np.full(len(blocks[-1]), step))
    fields: dict[str, Any] = {
        "topk": np.concatenate(blocks), "step": np.concatenate(steps),
        "layer_ids": np.array(layers),
    }  # fmt: skip
    if num_experts is None:
        num_experts = _num_experts(path.with_name("meta_info.json"))
    return Trace.of(fields, source=str(path), num_experts=num_experts)


def _forwards(arrays: dict[str, Array], path: Path) -> dict[int, dict[int, Array]]:
    """Iteration -> layer -> `[T, K]`."""
    forwards: dict[int, dict[int, Array]] = defaultdict(dict)
    for name, array in arrays.items():
        key = _KEY.fullmatch(name)
        if key is None or array.ndim != 2 or array.dtype.kind not in _INTEGERS:
            raise TraceError(
                f"{path}: {name} is {array.dtype} of shape {list(array.shape)}; entries are named "
                "<iteration>_<layer> and hold the experts of tokens, [tokens, experts a token]"
            )
        if len(array):
            forwards[int(key[1])][int(key[2])] = array
    if not forwards:
        raise TraceError(f"{path} holds no tokens; widen EXPERT_STATISTIC_ITER_RANGE")
    return forwards


def _num_experts(path: Path) -> int:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["num_experts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(
            f"{path} does not say num_experts ({type(error).__name__}); put the file of the "
            "recording there, or give --num-experts"
        ) from error
    return int(found)
