"""Placements in other programs' files: to the letter of their schemas, there and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moe_runtime.errors import PlacementError
from moe_runtime.integrations.placement_formats import FORMATS
from moe_runtime.integrations.placement_hints import PlacementHints
from tests.placements import HINTS, REPLICATED_ROWS, ROWS, assert_same, small_placement

SUFFIXES = {
    "sglang": ".json",
    "tensorrt-llm": ".yaml",
    "vllm-ascend": ".json",
    "vllm-list": ".json",
    "exflow": ".csv",
    "eplb": ".pt",
}
# Written by hand from the schemas of SGLang 0.5.23, TensorRT-LLM's ep_load_balancer example, the
# reader of vllm-ascend's expert_map_path, vLLM's pull request 49572 and ExFlow's solutions.
GOLDEN = {
    "sglang": """{
  "physical_to_logical_map": [
    [0, 1, 2, 3, 0, 1],
    [0, 3, 1, 0, 2, 1],
    [1, 2, 3, 0, 2, 3],
    [0, 1, 2, 3, 0, 1]
  ]
}
""",
    "tensorrt-llm": """num_slots: 6
layer_updates_per_iter: 0
initial_global_assignments:
  1: [0, 3, 1, 0, 2, 1]
  2: [1, 2, 3, 0, 2, 3]
""",
    "vllm-ascend": """{"moe_layer_count": 2, "layer_list": [
 {"layer_id": 0, "device_count": 2, "device_list": [
  {"device_id": 0, "device_expert": [0, 3, 1]}, {"device_id": 1, "device_expert": [0, 2, 1]}]},
 {"layer_id": 1, "device_count": 2, "device_list": [
  {"device_id": 0, "device_expert": [1, 2, 3]}, {"device_id": 1, "device_expert": [0, 2, 3]}]}]}
""",
    "vllm-list": "[\n  [0, 3, 1, 0, 2, 1],\n  [1, 2, 3, 0, 2, 3]\n]\n",
    "exflow": "Expert,Node\n0,0\n1,1\n2,1\n3,0\n4,1\n5,0\n6,0\n7,1\n",
}


def rows_of(name: str) -> list[list[int]]:
    """What the golden file holds: ExFlow knows no replicas."""
    return ROWS if name == "exflow" else REPLICATED_ROWS


def test_every_format_is_tested() -> None:
    assert list(SUFFIXES) == list(FORMATS)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_written_file_is_the_golden_one(name: str, tmp_path: Path) -> None:
    """Law: what is written is what the schema says, and nothing else."""
    path = tmp_path / f"out{SUFFIXES[name]}"
    FORMATS[name].write(small_placement(rows_of(name)), path)
    text = path.read_text()
    if name == "vllm-ascend":
        assert json.loads(text) == json.loads(GOLDEN[name])
    else:
        assert text == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_file_is_read(name: str, tmp_path: Path) -> None:
    """Law: a file of the schema becomes the placement that it says."""
    path = tmp_path / f"in{SUFFIXES[name]}"
    path.write_text(GOLDEN[name])
    found = FORMATS[name].read(path, HINTS)
    if name == "exflow":  # within a GPU it has no order
        np.testing.assert_array_equal(found.gpu_of(), small_placement().gpu_of())
    else:
        assert_same(found, small_placement(REPLICATED_ROWS))


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Law: what a format holds survives it; within a GPU ExFlow has no order."""
    path = tmp_path / f"file{SUFFIXES[name]}"
    placement = small_placement(rows_of(name))
    FORMATS[name].write(placement, path)
    found = FORMATS[name].read(path, HINTS)
    assert found.made == {"imported_from": name}
    if name == "exflow":
        np.testing.assert_array_equal(found.gpu_of(), placement.gpu_of())
    else:
        assert_same(found, placement)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_sglang_as_torch_file(tmp_path: Path) -> None:
    """Law: the one key, as int64, that weights-only loading takes; and back."""
    path = tmp_path / "location.pt"
    FORMATS["sglang"].write(small_placement(REPLICATED_ROWS), path)
    found = torch.load(path, weights_only=True)
    assert list(found) == ["physical_to_logical_map"]
    assert found["physical_to_logical_map"].dtype == torch.int64
    expected = json.loads(GOLDEN["sglang"])["physical_to_logical_map"]
    assert found["physical_to_logical_map"].tolist() == expected
    assert_same(FORMATS["sglang"].read(path, HINTS), small_placement(REPLICATED_ROWS))


def test_tensorrt_llm_keys_are_numbers(tmp_path: Path) -> None:
    """Law: layers are whole numbers for YAML, as Dict[int, List[int]] wants them."""
    path = tmp_path / "balancer.yaml"
    FORMATS["tensorrt-llm"].write(small_placement(), path)
    assert list(yaml.safe_load(path.read_text())["initial_global_assignments"]) == [1, 2]


def test_eplb_maps_agree(tmp_path: Path) -> None:
    """Law: log2phy and logcnt are those of phy2log, in the order of slots, padded by -1."""
    path = tmp_path / "maps.pt"
    FORMATS["eplb"].write(small_placement(REPLICATED_ROWS), path)
    found = torch.load(path, weights_only=True)
    assert found["phy2log"].tolist() == REPLICATED_ROWS
    assert found["logcnt"].tolist() == [[2, 2, 1, 1], [1, 1, 2, 2]]
    assert found["log2phy"].tolist() == [
        [[0, 3], [2, 5], [4, -1], [1, -1]],
        [[3, -1], [0, -1], [1, 4], [2, 5]],
    ]


@pytest.mark.parametrize("as_tuple", [True, False])
def test_eplb_results_saved_as_they_are(as_tuple: bool, tmp_path: Path) -> None:
    """Law: the README vector of EPLB, as rebalance_experts returns it, is read."""
    rows = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    table = torch.tensor(rows)
    torch.save((table, table, table) if as_tuple else table, tmp_path / "maps.pt")
    found = FORMATS["eplb"].read(tmp_path / "maps.pt", PlacementHints(gpus=8, nodes=2))
    assert found.slots.tolist() == rows
    assert (found.num_experts, found.num_slots, found.slots_per_gpu) == (12, 16, 2)


def test_vllm_one_row_for_all_layers(tmp_path: Path) -> None:
    """Law: the short form of the list stands for every layer, whose number must be known."""
    path = tmp_path / "map.json"
    path.write_text("[0, 1, 2, 3, 0, 1]")
    found = FORMATS["vllm-list"].read(path, HINTS)
    assert found.slots.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    with pytest.raises(PlacementError, match="does not say how many; give --like"):
        FORMATS["vllm-list"].read(path, PlacementHints(gpus=2))


def test_without_hints_all_rows_are_layers(tmp_path: Path) -> None:
    """Law: what nobody says is what the file shows: every row a layer, ids up to the largest."""
    path = tmp_path / "location.json"
    path.write_text(GOLDEN["sglang"])
    found = FORMATS["sglang"].read(path, PlacementHints(gpus=3))
    assert (found.num_layers, found.num_hidden_layers, found.num_experts) == (4, 4, 4)
    assert found.model == "unknown"
    with pytest.raises(PlacementError, match=r"how many GPUs its 6 slots .* --gpus"):
        FORMATS["sglang"].read(path, PlacementHints())


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Law: what a schema has no place for is refused, and nothing is written."""
    twice = small_placement([[0, 0, 3, 1, 2, 1], [1, 2, 3, 0, 2, 3]])
    for name, placement, suffix, said in (
        ("exflow", small_placement(REPLICATED_ROWS), ".csv", "6 slots for 4 experts"),
        ("vllm-ascend", twice, ".json", r"slots\[0\] has expert 0 twice on GPU 0"),
        ("sglang", twice, ".yaml", r"name it \.json or \.pt"),
        ("eplb", twice, ".json", r"name it \.pt"),
    ):
        with pytest.raises(PlacementError, match=said):
            FORMATS[name].write(placement, tmp_path / f"out{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("sglang", "{}", "has no physical_to_logical_map"),
        ("sglang", "[", "is not JSON"),
        ("sglang", '{"physical_to_logical_map": []}', "physical_to_logical_map is empty"),
        ("vllm-list", "[]", "the list is empty"),
        (
            "vllm-ascend",
            '{"moe_layer_count": 0, "layer_list": []}',
            "has 0 layers, with .. devices",
        ),
        ("exflow", "Expert,Node\n", "holds no experts"),
        ("sglang", '{"physical_to_logical_map": [[0, 1], [0]]}', r"map\[1\] has 1 entries"),
        ("sglang", '{"physical_to_logical_map": [[0, 1, 2, 3]]}', "layer 2 is asked for"),
        ("tensorrt-llm", "num_slots: 4", "has no initial_global_assignments"),
        ("tensorrt-llm", "a: [", "is not sound YAML"),
        (
            "tensorrt-llm",
            "num_slots: 5\ninitial_global_assignments: {1: [0, 1, 2, 3]}",
            "num_slots is 5, and layer 1 has 4",
        ),
        (
            "tensorrt-llm",
            "num_slots: 4\ninitial_global_assignments: {1: [0, 1, 2, 2]}",
            r"lacks expert 3",
        ),
        ("vllm-ascend", "{}", "lacks 'layer_list'"),
        ("vllm-ascend", "[]", "or holds it in another form"),
        (
            "vllm-ascend",
            '{"moe_layer_count": 2, "layer_list": [{"device_list": [{"device_expert": [0]}]}]}',
            r"moe_layer_count is 2, layer_list has 1 layers",
        ),
        (
            "vllm-ascend",
            '{"moe_layer_count": 1, "layer_list": [{"device_list": [{"device_expert": [0, 1]}, '
            '{"device_expert": [2]}]}]}',
            r"hold \[2, 1\] experts; give every device equally many",
        ),
        ("vllm-list", '{"expert_to_ep_rank": [0]}', "must be a list of lists"),
        ("exflow", "Expert,GPU\n0,0\n", "does not start with Expert,Node"),
        ("exflow", "Expert,Node\n0,0\n0,1\n2,0\n3,1\n", "line 3: expert 0 on GPU 1; experts 0 to"),
        (
            "exflow",
            "Expert,Node\n0,0\n1,0\n2,0\n3,1\n",
            "1 to 3 experts in a layer; every GPU of 2",
        ),
        ("exflow", "Expert,Node\n0,0\n1,x\n", "line 3: .* are not an expert and a GPU"),
        ("exflow", "Expert,Node\n0,0\n1,1\n", "2 experts, which are no whole layers of 4"),
    ],
)
def test_a_bad_file_is_named(name: str, text: str, said: str, tmp_path: Path) -> None:
    """Law: the file, what is wrong and what would be right."""
    path = tmp_path / f"bad{SUFFIXES[name]}"
    path.write_text(text)
    with pytest.raises(PlacementError, match=said) as caught:
        FORMATS[name].read(path, HINTS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["sglang", "eplb"])
def test_a_torch_file_with_code_is_not_read(name: str, tmp_path: Path) -> None:
    """Law: loading is weights-only; what could run code is refused by name."""
    path = tmp_path / "bad.pt"
    torch.save({"physical_to_logical_map": print, "phy2log": print}, path)
    with pytest.raises(PlacementError, match=r"bad\.pt holds Python objects beyond tensors"):
        FORMATS[name].read(path, HINTS)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(PlacementError, match=r"bad\.pt is no sound file of torch\.save"):
        FORMATS[name].read(path, HINTS)
