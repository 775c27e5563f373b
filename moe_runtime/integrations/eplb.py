"""EPLB's maps between slots and experts, as DeepSeek's rebalance_experts returns them (d52c72d)."""

from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.errors import PlacementError
from moe_runtime.integrations.placement_hints import PlacementHints
from moe_runtime.integrations.torch_file import load_torch_file, save_torch_file
from moe_runtime.placement_map import Placement, integer_table

Array = np.ndarray[Any, Any]


def write_placement(placement: Placement, path: Path) -> None:
    """A file of torch with `phy2log` [L, S], `log2phy` [L, E, R] padded by -1, `logcnt` [L, E]."""
    if path.suffix != ".pt":
        raise PlacementError(
            f"output {path}: EPLB's maps are tensors in a file of torch; name it .pt"
        )
    slots = placement.slots.astype(np.int64)
    num_layers, num_slots = slots.shape
    rows = np.arange(num_layers)[:, None]
    counts = np.zeros((num_layers, placement.num_experts), np.int64)
    np.add.at(counts, (rows, slots), 1)
    slot_of = np.full((num_layers, placement.num_experts, int(counts.max())), -1, np.int64)
    replica = np.zeros_like(counts)
    for slot in range(num_slots):
        expert = slots[:, slot]
        slot_of[rows[:, 0], expert, replica[rows[:, 0], expert]] = slot
        replica[rows[:, 0], expert] += 1
    save_torch_file(path, {"phy2log": slots, "log2phy": slot_of, "logcnt": counts})


def read_placement(path: Path, hints: PlacementHints) -> Placement:
    """`phy2log` from such a file, or a tensor that is it."""
    found = load_torch_file(path, PlacementError)
    if isinstance(found, tuple | list) and found:  # what rebalance_experts returns, saved as it is
        found = found[0]
    table: Any = found.get("phy2log") if isinstance(found, dict) else found
    if not hasattr(table, "tolist"):
        raise PlacementError(f"{path} has no tensor phy2log; it holds no maps of EPLB")
    return hints.placement(
        integer_table(table.tolist(), f"{path}: phy2log"), source=str(path), format_name="eplb"
    )
