"""Laws of a placement: what it holds, what its file says, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import PlacementError
from moe_runtime.placement_map import Placement

FIELDS: dict[str, Any] = {
    "model": "tiny",
    "num_experts": 4,
    "num_hidden_layers": 3,
    "layer_ids": (1, 2),
    "gpus": 2,
    "nodes": 1,
    "slots": np.array([[0, 3, 1, 2], [1, 2, 3, 0]]),
    "checkpoint": "0123456789abcdef",
    "made": {"solver": "search", "seed": 0},
}


def placement(**changes: Any) -> Placement:
    return Placement(**(FIELDS | changes))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any placement, replicas and all."""
    gpus = draw(st.sampled_from([1, 2, 4, 6]))
    num_experts = gpus * draw(st.integers(1, 3))
    num_slots = num_experts + gpus * draw(st.integers(0, 2))
    num_layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    extra = rng.integers(0, num_experts, (num_layers, num_slots - num_experts))
    every = np.tile(np.arange(num_experts), (num_layers, 1))
    return Placement(
        model=draw(st.text(max_size=5)),
        num_experts=num_experts,
        num_hidden_layers=2 * num_layers,
        layer_ids=tuple(range(1, 2 * num_layers, 2)),
        gpus=gpus,
        nodes=draw(st.sampled_from([n for n in (1, 2, 3) if gpus % n == 0])),
        slots=rng.permuted(np.concatenate([every, extra], axis=1), axis=1),
        checkpoint=draw(st.sampled_from(["", "0123"])),
        made={"seed": draw(st.integers(0, 9))},
    )


def test_slots_are_in_the_order_of_ranks() -> None:
    """Law: gpu_of, hosts and by_gpu say the same."""
    found = placement()
    assert found.slots_per_gpu == 2
    np.testing.assert_array_equal(found.gpu_of(), [[0, 1, 1, 0], [1, 0, 0, 1]])
    np.testing.assert_array_equal(found.by_gpu(), [[[0, 3], [1, 2]], [[1, 2], [3, 0]]])
    for gpu in range(2):
        np.testing.assert_array_equal(found.hosts()[:, gpu], found.gpu_of() == gpu)


@given(found=placements())
def test_hosts_are_those_of_the_slots(found: Placement) -> None:
    """Law: a GPU hosts an expert where one of its slots says so; a single GPU is the only host."""
    hosts = found.hosts()
    for layer in range(found.num_layers):
        for gpu in range(found.gpus):
            first = gpu * found.slots_per_gpu
            mine = found.slots[layer, first : first + found.slots_per_gpu]
            assert set(np.flatnonzero(hosts[layer, gpu])) == set(mine.tolist())
            if found.duplicate() is None:
                assert len(set(mine.tolist())) == len(mine)
    if not found.is_replicated:
        np.testing.assert_array_equal(np.argmax(hosts, axis=1), found.gpu_of())


@given(found=placements())
def test_a_file_holds_all_of_it(found: Placement, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Law: what was saved is what is loaded."""
    path = tmp_path_factory.mktemp("placement") / "placement.json"
    found.save(path)
    loaded = Placement.load(path)
    np.testing.assert_array_equal(loaded.slots, found.slots)
    for name in FIELDS.keys() - {"slots"}:
        assert getattr(loaded, name) == getattr(found, name)
    assert list(path.parent.iterdir()) == [path]


def test_the_file_of_a_small_placement(tmp_path: Path) -> None:
    """Law: the format, to the letter."""
    placement().save(tmp_path / "placement.json")
    assert (tmp_path / "placement.json").read_text() == (
        '{\n  "version": 1,\n  "model": "tiny",\n  "num_experts": 4,\n  "layer_ids": [1, 2],\n'
        '  "num_hidden_layers": 3,\n  "gpus": 2,\n  "nodes": 1,\n'
        '  "checkpoint": "0123456789abcdef",\n  "slots": [\n'
        "    [0, 3, 1, 2],\n    [1, 2, 3, 0]\n  ],\n"
        '  "made": {\n    "solver": "search",\n    "seed": 0\n  }\n}\n'
    )


def test_weights_may_be_unknown(tmp_path: Path) -> None:
    """Law: a file without their digest, as older ones are, loads and says nothing of them."""
    placement(checkpoint="").save(tmp_path / "placement.json")
    assert "checkpoint" not in (tmp_path / "placement.json").read_text()
    assert Placement.load(tmp_path / "placement.json").checkpoint == ""


def test_replicas_have_no_single_gpu() -> None:
    """Law: an expert on two GPUs is hosted by both, and gpu_of refuses to choose."""
    found = placement(slots=np.array([[0, 3, 1, 0, 2, 1]]), layer_ids=(1,))
    np.testing.assert_array_equal(found.hosts()[0], [[1, 1, 0, 1], [1, 1, 1, 0]])
    assert found.is_replicated
    assert found.duplicate() is None
    with pytest.raises(PlacementError, match="6 slots for 4 experts, so an expert has no single"):
        found.gpu_of()


def test_an_expert_twice_on_a_gpu_is_found() -> None:
    """Law: duplicate names layer, GPU and expert."""
    found = placement(slots=np.array([[0, 3, 1, 0, 2, 1], [0, 1, 2, 3, 0, 3]]))
    assert found.duplicate() == (1, 1, 3)


def test_slots_cannot_be_changed() -> None:
    """Law: a placement that was checked stays as it was."""
    mine = np.array([[0, 3, 1, 2], [1, 2, 3, 0]])
    found = placement(slots=mine)
    mine[0, 0] = 3
    assert found.slots[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        found.slots[0, 0] = 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 3}, "4 slots a layer do not divide among 3 GPUs; give every GPU equally many"),
        ({"nodes": 4}, "2 GPUs do not divide among 4 nodes; give every node equally many"),
        ({"gpus": 0}, "gpus is 0; it must be at least 1"),
        ({"num_experts": 3}, "slots[0][1] is 3; expert ids are 0 to 2"),
        ({"num_experts": 5}, "slots[0] lacks expert 4, so its tokens have nowhere to go"),
        ({"layer_ids": (1,)}, "layer_ids has 1 entries and slots 2 layers"),
        ({"layer_ids": (2, 1)}, "layer_ids [2, 1] must ascend from 0 or more"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, and layer_ids goes up to 2; it must "),
        ({"slots": np.zeros((2, 0), int)}, "slots is int64 of shape [2, 0]; it must be expert ids"),
        ({"slots": np.zeros((2, 4))}, "slots is float64 of shape [2, 4]; it must be expert ids"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    """Law: the thing, the value and what it must be, in one line."""
    with pytest.raises(PlacementError, match=re.escape(said)):
        placement(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "has version 2, and this program reads version 1; make it again"),
        ({"slots": None}, "has no field slots, so it is no placement"),
        ({"gpus": None, "nodes": None}, "lacks gpus, nodes; make it again"),
        ({"extra": 1}, "has unknown fields extra"),
        ({"gpus": 2.0}, "gpus is 2.0; it must be a whole number"),
        ({"model": 5}, "model is 5; it must be text"),
        ({"slots": [[0, 1, 2, 3], [0, 1]]}, "slots[1] has 2 entries, and slots[0] has 4"),
        ({"slots": [[0, 1, 2, "3"], [0, 1, 2, 3]]}, "slots[0][3] is '3', not an expert id"),
        ({"slots": 7}, "slots must be a list of lists"),
        ({"slots": []}, "slots is empty; a placement has at least a layer and a slot"),
        ({"slots": [[]]}, "slots is empty; a placement has at least a layer and a slot"),
        ({"layer_ids": [1, True]}, "layer_ids has 2 entries and slots 2 layers; they must be one"),
    ],
)
def test_a_bad_file_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Law: a file that is no placement is refused with its name and what is wrong."""
    path = tmp_path / "placement.json"
    placement().save(path)
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    with pytest.raises(PlacementError, match=re.escape(said)) as caught:
        Placement.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    """Law: what is not JSON, or not ours, is one PlacementError."""
    path = tmp_path / "placement.json"
    path.write_bytes(content)
    with pytest.raises(PlacementError, match=r"placement\.json (is not JSON|has no field slots)"):
        Placement.load(path)
    with pytest.raises(PlacementError, match="cannot be read: No such file"):
        Placement.load(tmp_path / "absent.json")
