"""vLLM-Ascend's expert map: devices and their experts, layer by layer, in JSON."""

import json
from pathlib import Path
from typing import Any

from moe_runtime.config import write_whole
from moe_runtime.errors import PlacementError
from moe_runtime.integrations.placement_hints import PlacementHints
from moe_runtime.placement_map import Placement, integer_table, read_json

_REMEDY = "write it as vllm-ascend's expert_map_path wants it"


def write_placement(placement: Placement, path: Path) -> None:
    """A file for `expert_map_path`. MoE layers only, numbered from 0.

    vllm-ascend cannot hold an expert twice on a device, so such placements are refused.
    """
    twice = placement.duplicate()
    if twice is not None:
        layer, gpu, expert = twice
        raise PlacementError(
            f"slots[{layer}] has expert {expert} twice on GPU {gpu}, which vllm-ascend refuses; "
            "solve the placement here instead of with EPLB"
        )
    layers = [
        {
            "layer_id": number,
            "device_count": placement.gpus,
            "device_list": [
                {"device_id": gpu, "device_expert": experts.tolist()}
                for gpu, experts in enumerate(row)
            ],
        }
        for number, row in enumerate(placement.by_gpu())
    ]
    found = {"moe_layer_count": placement.num_layers, "layer_list": layers}
    write_whole(path, json.dumps(found, indent=2) + "\n")


def read_placement(path: Path, hints: PlacementHints) -> Placement:
    """A file of `expert_map_path`."""
    found = read_json(path, _REMEDY)
    try:
        layers = sorted(found["layer_list"], key=lambda layer: int(layer.get("layer_id", 0)))
        tables = [_devices(layer, path) for layer in layers]
        count = found["moe_layer_count"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, PlacementError):
            raise
        raise PlacementError(
            f"{path} lacks {error}, or holds it in another form; {_REMEDY}"
        ) from error
    gpus = {len(table) for table in tables}
    if count != len(tables) or len(gpus) != 1:
        raise PlacementError(
            f"{path}: moe_layer_count is {count}, layer_list has {len(tables)} layers, with "
            f"{sorted(gpus)} devices; {_REMEDY}"
        )
    slots = integer_table(
        [[e for row in table for e in row] for table in tables], f"{path}: device_expert"
    )
    return hints.placement(slots, source=str(path), format_name="vllm-ascend", gpus=gpus.pop())


def _devices(layer: dict[str, Any], path: Path) -> list[list[int]]:
    """Experts of every device of a layer, in the order of the devices."""
    devices = layer["device_list"]
    if all("device_id" in device for device in devices):
        devices = sorted(devices, key=lambda device: int(device["device_id"]))
    table: list[list[int]] = [device["device_expert"] for device in devices]
    if not table or len({len(row) for row in table}) != 1:
        raise PlacementError(
            f"{path}: devices of a layer hold {[len(row) for row in table]} experts; give every "
            "device equally many"
        )
    return table
