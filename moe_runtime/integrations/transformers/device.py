"""The one device on which a model computes."""

from collections.abc import Mapping
from typing import Any

import torch


def single_device(device_map: Any) -> torch.device:
    """The device that `device_map` names, a GPU by its number; of None a GPU if there is one.

    Raises ValueError for several devices, and for one that is not there.
    """
    if isinstance(device_map, Mapping):
        values = set(device_map.values())
        if set(device_map) != {""} or len(values) != 1:
            raise ValueError(
                f"device_map {dict(device_map)!r} spreads the model; moe_runtime.load() takes one "
                'device for dense weights and experts, such as "cpu" or {"": 0}'
            )
        device_map = values.pop()
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential", "disk", "meta"):
        raise ValueError(
            f"device_map={device_map!r} is accelerate's; moe_runtime.load() places experts itself: "
            'leave device_map out, or give one device such as "cpu" or "cuda:0"'
        )
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device {device_map!r} is unknown; give one such as 'cpu', 'cuda' or 'cuda:0'"
        ) from None
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type != "cpu" and (device.index or 0) >= num_gpus:
        raise ValueError(
            f"device {str(device)!r} is not available to torch {torch.__version__} here, or not of "
            "a kind that experts can be copied to in the background; use 'cpu' or 'cuda', or see "
            "what moe-runtime doctor says"
        )
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def has_tiers(device: torch.device) -> bool:
    """Whether experts travel to `device` through tiers of memory: they do but on the CPU."""
    return device.type != "cpu"
