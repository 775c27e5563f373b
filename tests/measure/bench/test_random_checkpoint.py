"""A random checkpoint is one that transformers and moe_runtime read as any other."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import moe_runtime
from moe_runtime.measure.bench import random_checkpoint
from moe_runtime.measure.bench.random_checkpoint import write_random_checkpoint
from tests.small_preset import NAMES, small_preset

MIXTRAL = small_preset("mixtral-8x7b")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_checkpoint, "_SHARD_BYTES", 100_000)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("name", NAMES)
def test_it_loads_without_missing_or_unexpected_tensors(name: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(small_preset(name), tmp_path / name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    tokens = torch.arange(6)[None]
    ours = moe_runtime.load(folder, expert_memory="50%", exact=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model(tokens).logits)


def test_tensors_are_noise_of_the_config_and_norms_one(tmp_path: Path) -> None:
    folder = write_random_checkpoint(MIXTRAL, tmp_path / "it", dtype=torch.float32)
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        if "norm" in name:
            assert (weight == 1).all()
        else:
            sigma = 1.0 if "embed_tokens" in name else 0.2
            assert weight.std().item() == pytest.approx(sigma, rel=0.1)


def test_equal_arguments_give_equal_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        bytes_of(write_random_checkpoint(MIXTRAL, tmp_path / name, seed=seed))
        for name, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert first["model-00001-of-00001.safetensors"] != other["model-00001-of-00001.safetensors"]


def test_a_deeper_model_begins_as_a_shallower_one(tmp_path: Path) -> None:
    shallow, deep = (
        AutoModelForCausalLM.from_pretrained(
            write_random_checkpoint(MIXTRAL, tmp_path / str(num_layers), num_layers=num_layers)
        ).state_dict()
        for num_layers in (2, 3)
    )
    assert len(deep) > len(shallow)
    assert all(torch.equal(weight, deep[name]) for name, weight in shallow.items())


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = write_random_checkpoint(
        MIXTRAL, tmp_path / "it", on_progress=lambda done, total: seen.append((done, total))
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert seen[-1] == (index["metadata"]["total_size"],) * 2


def test_a_finished_checkpoint_is_left_as_it_is(tmp_path: Path) -> None:
    folder = write_random_checkpoint(MIXTRAL, tmp_path / "it")
    before = (folder / "config.json").stat().st_mtime_ns
    write_random_checkpoint(MIXTRAL, folder)
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_a_checkpoint_that_lost_bytes_is_written_again(tmp_path: Path) -> None:
    folder = write_random_checkpoint(MIXTRAL, tmp_path / "it")
    whole = bytes_of(folder)
    file = folder / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert bytes_of(write_random_checkpoint(MIXTRAL, folder)) == whole


def test_another_checkpoint_written_here_is_replaced(tmp_path: Path) -> None:
    folder = write_random_checkpoint(MIXTRAL, tmp_path / "it")
    write_random_checkpoint(MIXTRAL, folder, num_experts=4)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_experts == 4


def test_files_of_somebody_else_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds files that are no random checkpoint of ours"):
        write_random_checkpoint(MIXTRAL, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(MIXTRAL, tmp_path / "it", on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "it.partial").mkdir()
    (tmp_path / "it.partial" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    folder = write_random_checkpoint(MIXTRAL, tmp_path / "it")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2048, 1024, 1024))
    with pytest.raises(ValueError, match=r"it\.partial needs .* of disk and 1\.0 KiB are free"):
        write_random_checkpoint(MIXTRAL, tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(1, 400_000_000), min_size=1, max_size=30))
def test_shards_keep_order_and_only_a_single_tensor_exceeds_their_size(sizes: list[int]) -> None:
    tensors = {
        str(i): torch.empty(size, dtype=torch.bfloat16, device="meta")
        for i, size in enumerate(sizes)
    }
    shards = list(random_checkpoint._shards(tensors))
    assert [name for shard in shards for name in shard] == list(tensors)
    for shard in shards:
        num_bytes = sum(tensors[name].nbytes for name in shard)
        assert len(shard) == 1 or num_bytes <= random_checkpoint._SHARD_BYTES
