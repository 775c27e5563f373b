"""Laws of checkpoints: all shards are one map, and an index cannot lie about them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_runtime.errors import CheckpointError
from moe_runtime.memory.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tensors `a`, `b` in one shard and `c` in another."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(4)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def test_shards_are_one_map(folder: Path) -> None:
    """Law: every name leads to its own shard, and files are listed once, in order."""
    checkpoint = Checkpoint.open(folder)
    assert {name: place.file.name for name, place in checkpoint.items()} == {
        "a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors",
    }  # fmt: skip
    assert [f.name for f in checkpoint.files()] == ["one.safetensors", "two.safetensors"]
    assert len(checkpoint) == 3
    assert "d" not in checkpoint


def test_single_file(tmp_path: Path) -> None:
    """Law: without an index `model.safetensors` is the checkpoint."""
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_NAME)
    assert list(Checkpoint.open(tmp_path)) == ["a"]


def test_links_of_the_hub_cache_are_followed(folder: Path) -> None:
    """Law: a shard that is a link out of the folder is read, as the hub cache lays it out."""
    blob = folder.parent / f"{folder.name}-blob"
    (folder / "two.safetensors").rename(blob)
    (folder / "two.safetensors").symlink_to(blob)
    assert set(Checkpoint.open(folder)) == {"a", "b", "c"}


def test_empty_folder(tmp_path: Path) -> None:
    """Law: a folder without safetensors says what is missing and how to get it."""
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor .*index"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [b"{", b"[]", b"3", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b'{"x": {}}', b"\xff",
     b"[" * 100_000],
    ids=["cut", "list", "number", "map is a number", "shard is a number", "no map", "not utf-8",
         "bottomless"],
)  # fmt: skip
def test_damaged_index_is_named(folder: Path, raw: bytes) -> None:
    """Law: an index that is not JSON, or has no map of names to files, is named as damaged."""
    (folder / INDEX_NAME).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "shard",
    ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "", "one.safetensors/"],
)
def test_paths_that_leave_the_folder_are_refused(folder: Path, shard: str) -> None:
    """Law: an index entry with a path, relative or absolute, is refused before it is opened."""
    write_index(folder, {"a": shard})
    with pytest.raises(CheckpointError, match="leaves the model folder") as caught:
        Checkpoint.open(folder)
    assert INDEX_NAME in str(caught.value)
    assert repr(shard) in str(caught.value)


@pytest.mark.parametrize("shard", ["three.safetensors", "x" * 300, "nul\0byte"])
def test_absent_shard_is_named(folder: Path, shard: str) -> None:
    """Law: a shard that does not exist is named, whatever its name is."""
    write_index(folder, {"a": "one.safetensors", "c": shard})
    with pytest.raises(CheckpointError, match="does not exist; download the checkpoint") as caught:
        Checkpoint.open(folder)
    assert repr(shard) in str(caught.value)


def test_tensor_not_in_its_shard_is_named(folder: Path) -> None:
    """Law: an index that places a tensor in the wrong shard is not believed."""
    write_index(folder, {"a": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"places tensor 'a' in 'two\.safetensors'"):
        Checkpoint.open(folder)


def test_damaged_shard_is_named(folder: Path) -> None:
    """Law: damage in one shard of many names that shard."""
    shard = folder / "two.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"two\.safetensors is damaged.*truncated"):
        Checkpoint.open(folder)
