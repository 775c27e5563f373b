"""A small placement: layers 1 and 2 of 4, 4 experts on 2 GPUs, with and without replicas."""

from typing import Any

import numpy as np

from moe_runtime.integrations.placement_hints import PlacementHints
from moe_runtime.placement_map import Placement

ROWS = [[0, 3, 1, 2], [1, 2, 3, 0]]
REPLICATED_ROWS = [[0, 3, 1, 0, 2, 1], [1, 2, 3, 0, 2, 3]]
FACTS: dict[str, Any] = {
    "model": "tiny",
    "num_experts": 4,
    "num_hidden_layers": 4,
    "layer_ids": (1, 2),
    "gpus": 2,
    "nodes": 1,
}
HINTS = PlacementHints(**FACTS)


def small_placement(rows: list[list[int]] = ROWS, **changes: Any) -> Placement:
    return Placement(**{**FACTS, "slots": np.array(rows), **changes})


def assert_same(found: Placement, expected: Placement) -> None:
    """All but how it was made."""
    np.testing.assert_array_equal(found.slots, expected.slots)
    for name in FACTS:
        assert getattr(found, name) == getattr(expected, name), name
