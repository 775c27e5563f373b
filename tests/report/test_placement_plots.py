"""Laws of a placement's pictures: the format that the name asks for, and all that is promised."""

import re
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.placement.topology import Topology
from moe_runtime.placement_map import Placement
from moe_runtime.report.placement_plots import plot_placement
from tests.routed_traces import routed_trace

STARTS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def placement(num_layers: int, replicas: int) -> Placement:
    row = np.arange(8 + replicas) % 8
    return Placement(
        model="planted", num_experts=8, num_hidden_layers=9, layer_ids=tuple(range(num_layers)),
        gpus=4, nodes=1, slots=np.tile(row, (num_layers, 1)), made={"balance": 1.2},
    )  # fmt: skip


@pytest.mark.parametrize(("num_layers", "replicas"), [(1, 0), (3, 4)])
@pytest.mark.parametrize("suffix", STARTS)
def test_a_picture_is_what_its_name_says(
    suffix: str, num_layers: int, replicas: int, tmp_path: Path
) -> None:
    """Law: one layer or many, replicas or none, the file is of the format of its ending."""
    path = tmp_path / f"placement{suffix}"
    trace = routed_trace(num_layers=num_layers, num_sequences=3)
    plot_placement(placement(num_layers, replicas), [trace], path, topology=Topology.flat(4))
    assert path.read_bytes().startswith(STARTS[suffix])


def test_a_picture_has_all_its_parts(tmp_path: Path) -> None:
    """Law: map, traffic before and after, load with its limit, affinity by id and by GPU."""
    path = tmp_path / "placement.svg"
    plot_placement(placement(3, 0), [routed_trace(num_layers=3)], path, topology=Topology.flat(4))
    comments = " ".join(re.findall("<!-- (.*?) -->", path.read_text()))
    for text in (
        "planted: 3 layers of 8 experts in 8 slots on 4 GPUs, 1,200 tokens",
        "which GPU holds which expert",
        "experts in order of their ids:",
        "this placement:",
        "load of GPUs, averaged over layers",
        "limit 1.2",
        "experts by id",
        "experts by GPU",
        "share of the expert's tokens",
    ):
        assert text in comments, text
