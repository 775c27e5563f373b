"""The placement files of other programs, by the names that the command line knows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.integrations import eplb, exflow, sglang, tensorrt_llm, vllm, vllm_ascend
from moe_runtime.integrations.placement_hints import PlacementHints
from moe_runtime.placement_map import Placement


@dataclass(frozen=True, slots=True)
class PlacementFormat:
    """How a kind of file is written and read."""

    write: Callable[[Placement, Path], None]
    read: Callable[[Path, PlacementHints], Placement]


FORMATS: Mapping[str, PlacementFormat] = {
    "sglang": PlacementFormat(sglang.write_placement, sglang.read_placement),
    "tensorrt-llm": PlacementFormat(tensorrt_llm.write_placement, tensorrt_llm.read_placement),
    "vllm-ascend": PlacementFormat(vllm_ascend.write_placement, vllm_ascend.read_placement),
    "vllm-list": PlacementFormat(vllm.write_placement, vllm.read_placement),
    "exflow": PlacementFormat(exflow.write_placement, exflow.read_placement),
    "eplb": PlacementFormat(eplb.write_placement, eplb.read_placement),
}
