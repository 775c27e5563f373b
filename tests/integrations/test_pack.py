"""A packed model is the same model: every bit of its outputs, and every byte when unpacked."""

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_runtime
from moe_runtime.errors import (
    BudgetError,
    CheckpointError,
    ExpertReadError,
    UnsupportedModelError,
)
from moe_runtime.integrations.transformers import pack as pack_module
from moe_runtime.integrations.transformers.pack import pack_model
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.measure.inspection import inspect_model
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.layout import BLOCK_BYTES
from moe_runtime.memory.packing import PackedTensor
from moe_runtime.memory.read_tensor import read_tensor
from moe_runtime.memory.unpack_folder import unpack_folder
from tests.tiny_checkpoint import save_mixtral
from tests.tiny_models import logits_of, prompt, tiny_model

# Experts one by one, fused with bias and transposed, fused, and with a conversion that rearranges.
FAMILIES = ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"]
KINDS = ["packed", "unpacked"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Mixtral in several files, with a tokenizer and a file that is no weight."""
    folder = tmp_path_factory.mktemp("source") / "model"
    save_mixtral(folder, max_shard_size="40KB", dtype="bfloat16", intermediate_size=64)
    cast_to_bfloat16(folder)
    (folder / "LICENSE").write_text("free")
    return folder


def cast_to_bfloat16(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


@pytest.fixture(scope="module")
def packed(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    pack_model(sharded, folder)
    return folder


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """The packed model, to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def load(
    folder: Path, kind: str = "auto", expert_memory: str = "60%", *, exact: bool = False
) -> PreTrainedModel:
    return moe_runtime.load(folder, expert_memory=expert_memory, expert_slots=kind, exact=exact)


def same_files(one: Path, other: Path) -> bool:
    found = filecmp.dircmp(one, other)
    names = found.common_files
    equal, _, _ = filecmp.cmpfiles(one, other, names, shallow=False)
    return not found.left_only and not found.right_only and sorted(equal) == sorted(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_equal_in_every_bit(family: str, tmp_path: Path) -> None:
    """Law: whether experts stay packed in slots or not, in prompts and with one token."""
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    pack_model(tmp_path / "model", tmp_path / "packed")
    ids = prompt()
    plain = moe_runtime.load(tmp_path / "model", expert_memory="60%")
    for kind in KINDS:
        model = load(tmp_path / "packed", kind)
        for part in (ids, ids[:1, :1]):
            assert torch.equal(logits_of(model, part), logits_of(plain, part)), kind
        moe_runtime.handle(model).close()
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert same_files(tmp_path / "model", tmp_path / "back")


@pytest.mark.parametrize("exact", [False, True])
def test_prompts_with_many_rows_of_an_expert(exact: bool, sharded: Path, packed: Path) -> None:
    """Law: what torch computes of packed slots is expanded first, and has the same bits."""
    ids = torch.arange(3, 63).view(2, 30)
    plain = logits_of(load(sharded, exact=exact), ids)
    model = load(packed, "packed", exact=exact)
    assert torch.equal(logits_of(model, ids), plain)
    assert torch.equal(
        logits_of(model, ids[:1, :1]), logits_of(load(sharded, exact=exact), ids[:1, :1])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_poison(kind: str, sharded: Path, packed: Path) -> None:
    """Law: slots that are reused are never used before they are read and unpacked again."""
    ids = torch.tensor([[7, 50, 60, 9]])
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model = load(packed, kind, "35%")
    moe_runtime.handle(model).engine._poison = True
    found = model.generate(ids, **settings)
    assert torch.equal(found, load(sharded, expert_memory="35%").generate(ids, **settings))


def test_large_experts_need_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: blocks that stay packed are read in place, and checked there."""
    save_mixtral(tmp_path / "plain", hidden_size=512, intermediate_size=800)
    cast_to_bfloat16(tmp_path / "plain")
    pack_model(tmp_path / "plain", tmp_path / "packed")
    model = load(tmp_path / "packed", "packed", "35%")
    reader = moe_runtime.handle(model).engine.reader
    if reader.is_direct and max(f.block_bytes for f in reader._files.values()) == BLOCK_BYTES:
        monkeypatch.setattr(reader, "_read", None)  # reads that are copied
    for ids in (prompt(), prompt()[:1, :1]):
        plain = load(tmp_path / "plain", expert_memory="35%")
        assert torch.equal(logits_of(model, ids), logits_of(plain, ids))


def test_float32_of_packed_bfloat16(sharded: Path, packed: Path) -> None:
    """Law: what must be cast on its way is unpacked first; it cannot stay packed."""
    settings = {"expert_memory": "60%", "dtype": torch.float32}
    ids = torch.tensor([[7, 50, 60]])
    plain, model = (moe_runtime.load(folder, **settings) for folder in (sharded, packed))
    assert torch.equal(logits_of(model, ids), logits_of(plain, ids))
    with pytest.raises(UnsupportedModelError, match="expert_slots='packed' needs"):
        moe_runtime.load(packed, expert_slots="packed", **settings)


def test_restored_experts_are_those_of_the_source(sharded: Path, packed: Path) -> None:
    for kind in KINDS:
        model = load(packed, kind)
        moe_runtime.handle(model).restore()
        source = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
        assert all(torch.equal(value, source[n]) for n, value in model.state_dict().items())


def test_every_tensor_keeps_name_dtype_shape_and_address(sharded: Path, packed: Path) -> None:
    """Law: also its place modulo a cache line, on which sums of matrix kernels may depend."""
    ours, theirs = Checkpoint.open(packed), Checkpoint.open(sharded)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        found = ours[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.offset % 64 == tensor.offset % 64
        assert torch.equal(read_tensor(found), read_tensor(tensor))
        assert isinstance(found, PackedTensor) == (".experts." in name)


def test_a_packed_model_reads_fewer_bytes_and_holds_more_experts(
    sharded: Path, packed: Path
) -> None:
    plain, unpacked, kept = load(sharded), load(packed, "unpacked"), load(packed, "packed")
    slots = [moe_runtime.handle(m).report()["cache"]["slots"] for m in (plain, unpacked, kept)]
    assert slots[0] == slots[1] < slots[2]
    read = []
    for model in (plain, unpacked, kept):
        model(torch.tensor([[7, 50]]))
        cache = moe_runtime.handle(model).report()["cache"]
        read.append(cache["bytes_read"] / cache["misses"])
    assert max(read[1:]) < 0.97 * read[0]  # small experts, read in blocks of the disk


@pytest.mark.parametrize("memory", ["100%", "60%"])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_room_stay_within_the_budget(memory: str, kind: str, packed: Path) -> None:
    handle = moe_runtime.handle(load(packed, kind, memory))
    settings, cache = handle.report()["settings"], handle.report()["cache"]
    assert settings["expert_slots"] == kind
    assert settings["packed_on_disk"]
    assert f"of {kind} slots" in handle.placement()
    budget = handle.budget
    assert budget.used_bytes <= budget.budget_bytes
    assert cache["slots"] == budget.num_slots


def test_experts_stay_packed_where_they_do_not_fit_otherwise(tmp_path: Path) -> None:
    """Law: a kernel computes from packed slots; exact code needs room for one unpacked expert.

    With many experts a token that is still the smaller floor.
    """
    settings = {"num_local_experts": 8, "num_experts_per_tok": 8, "intermediate_size": 512}
    save_mixtral(tmp_path / "model", hidden_size=128, **settings)
    cast_to_bfloat16(tmp_path / "model")
    pack_model(tmp_path / "model", tmp_path / "packed")
    plain, ours = inspect_model(tmp_path / "model"), inspect_model(tmp_path / "packed")
    assert ours.floor_bytes < plain.floor_bytes
    exact = moe_runtime.handle(load(tmp_path / "packed", exact=True)).budget.floor_bytes
    assert exact < plain.floor_bytes
    has_kernel = ours.floor_bytes < exact
    assert has_kernel == (CpuExperts.load(torch.bfloat16) is not None)
    ids = torch.tensor([[7, 50, 60]])
    for memory, is_exact, kind in [
        (ours.floor_bytes, False, "packed"),
        (plain.floor_bytes, False, "packed" if has_kernel else "unpacked"),
        (exact, True, "packed"),
        (plain.floor_bytes, True, "unpacked"),
    ]:
        model = load(tmp_path / "packed", "auto", str(memory), exact=is_exact)
        assert moe_runtime.handle(model).report()["settings"]["expert_slots"] == kind
        expected = logits_of(load(tmp_path / "model", exact=is_exact), ids)
        assert torch.equal(logits_of(model, ids), expected)


def test_the_smallest_budget_runs(packed: Path) -> None:
    """Law: and one byte less is refused, for both kinds of slots together and each alone."""
    floor = inspect_model(packed).floor_bytes
    load(packed, "auto", str(floor))(torch.tensor([[7]]))
    with pytest.raises(BudgetError, match=f"set expert_memory={floor} or more"):
        load(packed, "auto", str(floor - 1))
    with pytest.raises(BudgetError, match="below the floor"):
        load(packed, "packed", str(floor), exact=True)  # exact code needs room to unpack


def test_inspect_says_what_is_packed(sharded: Path, packed: Path) -> None:
    ours, theirs = inspect_model(packed), inspect_model(sharded)
    assert theirs.packed_expert_bytes is None
    assert ours.packed_expert_bytes is not None
    assert ours.packed_expert_bytes < 0.95 * ours.num_experts * ours.expert_bytes
    same = ("family", "dtype", "num_experts", "expert_bytes", "dense_bytes", "expert_layout")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in same)


def test_unmodified_transformers_refuses_a_packed_folder(packed: Path) -> None:
    """Law: nobody gets random experts where packed ones are."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(packed)


class _InterruptedError(Exception):
    """Stands for a Ctrl-C that a test can catch."""


def test_packing_goes_on_after_an_interruption(
    sharded: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: finished files are not made again, and what comes out is what comes out at once."""
    made: list[str] = []
    original = pack_module.pack_file

    def count(source: Path, *arguments: object) -> object:
        if len(made) == 2:
            raise _InterruptedError
        made.append(source.name)
        return original(source, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_module, "pack_file", count)
    with pytest.raises(_InterruptedError):
        pack_model(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        load(tmp_path / "out.partial")
    first = made.copy()
    made[:] = []
    monkeypatch.setattr(
        pack_module, "pack_file", lambda s, *a: (made.append(s.name), original(s, *a))[1]
    )
    pack_model(sharded, tmp_path / "out")
    assert not set(first) & set(made)
    assert len(first) + len(made) == len(Checkpoint.open(sharded).files())
    assert same_files(packed, tmp_path / "out")
    made[:] = []
    pack_model(sharded, tmp_path / "out")
    assert made == [], "it is done"


def test_what_was_begun_of_another_source_is_refused(sharded: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sharded, tmp_path / "other"))
    file = sorted(other.glob("*.safetensors"))[0]
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    pack_model(sharded, tmp_path / "out")
    with pytest.raises(ValueError, match="holds a packing of another source; name a folder"):
        pack_model(other, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.partial")
    with pytest.raises(ValueError, match="is the beginning of a packing of another source"):
        pack_model(other, tmp_path / "out")


def test_a_file_that_is_not_given_back_is_refused(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: every file is read back from the disk before it counts as packed."""
    original = pack_module.pack_file

    def damage(source: Path, target: Path, *arguments: object) -> object:
        made = original(source, target, *arguments)  # type: ignore[arg-type]
        raw = bytearray(target.read_bytes())
        raw[-1] ^= 1
        target.write_bytes(raw)
        return made

    monkeypatch.setattr(pack_module, "pack_file", damage)
    with pytest.raises((CheckpointError, ExpertReadError), match=r"does not give back|was altered"):
        pack_model(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_expert_is_refused(kind: str, copy: Path) -> None:
    """Law: in the middle of any block, when it is read; the error names file and offset."""
    for file in copy.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        for tensor in Checkpoint.open(copy).values():
            if isinstance(tensor, PackedTensor) and tensor.file == file:
                raw[tensor.packed_offset + 200] ^= 4
        file.write_bytes(raw)
    model = load(copy, kind)
    with pytest.raises(ExpertReadError, match=r"was altered: the checksum .* at offset \d+"):
        model(torch.tensor([[7, 50, 60]]))


def test_an_altered_dense_weight_is_refused(copy: Path) -> None:
    tensor = Checkpoint.open(copy)["model.norm.weight"]
    raw = bytearray(tensor.file.read_bytes())
    raw[tensor.offset + 1] ^= 1
    tensor.file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"altered: the checksum of model\.norm\.weight"):
        load(copy)
    with pytest.raises(CheckpointError, match="does not give back the file"):
        unpack_folder(copy, copy.with_name("back"))
    assert not copy.with_name("back").exists()


def damage_truncate(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-64])


def damage_other_source(folder: Path) -> None:
    manifest = json.loads((folder / "packing.json").read_text())
    manifest["fingerprint"] = "0" * 64
    (folder / "packing.json").write_text(json.dumps(manifest))


def damage_manifest(folder: Path) -> None:
    (folder / "packing.json").write_text("{")


def damage_version(folder: Path) -> None:
    manifest = json.loads((folder / "packing.json").read_text())
    manifest["version"] = 99
    (folder / "packing.json").write_text(json.dumps(manifest))


def damage_runs(folder: Path) -> None:
    manifest = json.loads((folder / "packing.json").read_text())
    for file in manifest["files"].values():
        for runs in file["packed"].values():
            runs[0][0] += 1
    (folder / "packing.json").write_text(json.dumps(manifest))


def damage_missing(folder: Path) -> None:
    manifest = json.loads((folder / "packing.json").read_text())
    manifest["files"].popitem()
    (folder / "packing.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (damage_truncate, "truncated"),
        (damage_other_source, "was packed of another source"),
        (damage_manifest, "packing.json is damaged"),
        (damage_version, "has version 99 and this moe_runtime reads version 1"),
        (damage_runs, "does not hold the tensors"),
        (damage_missing, "is not in packing.json"),
    ],
)
def test_damaged_folders_are_refused_before_weights_are_read(
    damage: Callable[[Path], None], complaint: str, copy: Path
) -> None:
    damage(copy)
    for use in (load, inspect_model, lambda folder: unpack_folder(folder, folder / "out")):
        with pytest.raises(CheckpointError, match=complaint) as caught:
            use(copy)  # type: ignore[operator]
        assert "\n" not in str(caught.value)


def test_random_bits_stay_as_they_are(tmp_path: Path) -> None:
    """Law: where packing does not pay, a tensor is left alone, and still seals its bytes."""
    folder = tmp_path / "model"
    model = tiny_model("mixtral").to(torch.bfloat16)
    name = next(n for n, _ in model.named_parameters() if n.endswith("gate_up_proj"))
    with torch.no_grad():
        words = torch.randint(-(2**15), 2**15, model.get_parameter(name).shape, dtype=torch.int16)
        words[(words.view(torch.bfloat16).isnan())] = 0
        model.get_parameter(name).copy_(words.view(torch.bfloat16))
    model.save_pretrained(folder)
    made = pack_model(folder, tmp_path / "packed")
    assert made.num_unpaid == 2 * 8  # gate and up of one layer's experts
    assert made.num_packed > 0
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    assert same_files(folder, tmp_path / "back")
    handle = moe_runtime.handle(load(tmp_path / "packed", "packed"))
    handle.restore()


def test_nothing_to_pack_is_said(tmp_path: Path, packed: Path) -> None:
    save_mixtral(tmp_path / "float32")
    with pytest.raises(UnsupportedModelError, match="no experts in bfloat16"):
        pack_model(tmp_path / "float32", tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="is packed already"):
        pack_model(packed, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="expert_slots='packed' needs"):
        load(tmp_path / "float32", "packed")
    with pytest.raises(ValueError, match="'half' is unknown; choose from auto, packed, unpacked"):
        load(packed, "half")


def test_places_that_are_taken_are_refused(sharded: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for use in (pack_model, unpack_folder):
        with pytest.raises(ValueError, match="holds files; name a folder"):
            use(sharded if use is pack_model else packed, tmp_path / "taken")
    (tmp_path / "out.partial").mkdir()
    for use in (pack_model, unpack_folder):
        with pytest.raises(ValueError, match=r"out\.partial is in the way; remove it"):
            use(sharded if use is pack_model else packed, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds no packing\.json"):
        unpack_folder(sharded, tmp_path / "back")


def test_a_full_disk_is_refused_first(
    sharded: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("moe_runtime.memory.disk_space.shutil.disk_usage", lambda path: usage)
    for use in (pack_model, unpack_folder):
        with pytest.raises(ValueError, match="are free; name a folder on another disk"):
            use(sharded if use is pack_model else packed, tmp_path / "out")
    assert not list(tmp_path.iterdir())
