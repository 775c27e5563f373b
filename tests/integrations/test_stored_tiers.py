"""Laws of experts that travel to a device as they are stored, over a fake accelerator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import moe_runtime
from moe_runtime.errors import BudgetError, CheckpointError, UnsupportedModelError
from moe_runtime.integrations.transformers import device_tiers, tiered_maths
from moe_runtime.integrations.transformers import load as load_module
from moe_runtime.integrations.transformers.pack import pack_model
from moe_runtime.kernels.scaled_blocks import TorchDequantizer
from tests.fake_streams import FakeMachine
from tests.quantised_checkpoints import (
    load_dequantised,
    resave,
    save_fp8,
    save_mxfp4,
    tensors_of,
)
from tests.stored_experts import cpu_unpack
from tests.tiered_world import needs_interpreter
from tests.tiny_models import logits_of, prompt, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*expert slots are fewer"),
    pytest.mark.filterwarnings("ignore:host_memory and miss have no effect"),
]
BF16, F32 = torch.bfloat16, torch.float32
# Kernels of float32 add up in another order than torch does, a dozen times over.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that Triton does not know: torch dequantises and computes each expert."""
    monkeypatch.setattr(tiered_maths, "find_grouped", lambda *_: "the test says no")
    monkeypatch.setattr(device_tiers, "find_dequantizer", lambda *_: TorchDequantizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> a quantised checkpoint, made once."""
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            save = save_mxfp4 if name == "mxfp4" else save_fp8
            made[name] = save(tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return folder_of


def load(path: Path, **settings: Any) -> PreTrainedModel:
    chosen = {"expert_memory": "35%", "host_memory": "60%", "warm_start": False} | settings
    return moe_runtime.load(path, **chosen)


def tiers_of(model: PreTrainedModel) -> dict[str, Any]:
    found: dict[str, Any] = moe_runtime.handle(model).report()["tiers"]
    return found


@pytest.mark.usefixtures("no_triton", "machine")
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_exact_outputs_are_those_of_transformers(
    folder: Callable[[str], Path], name: str, dtype: torch.dtype
) -> None:
    """Law: with exact=True logits equal the dequantised model's in every bit; none stays dense."""
    ours, theirs = (
        load(folder(name), exact=True, dtype=dtype),
        load_dequantised(folder(name), dtype),
    )
    for num_rows, num_tokens in ((1, 1), (2, 12), (1, 60)):
        ids = prompt(num_rows, num_tokens, seed=num_tokens)
        assert torch.equal(logits_of(ours, ids), logits_of(theirs, ids))
    handle = moe_runtime.handle(ours)
    slot_bytes = handle.engine.tensor_map.slot_bytes
    assert handle.engine.host_slots.slot_bytes == handle.budget.slot_bytes == slot_bytes
    assert handle.budget.kind.room_bytes > 1.9 * slot_bytes
    assert tiers_of(ours)["misses_copied"] > tiers_of(ours)["misses_computed"] == 0
    assert tiers_of(ours)["bytes_copied"] <= tiers_of(ours)["misses_copied"] * slot_bytes


@pytest.mark.usefixtures("no_triton", "machine")
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
@pytest.mark.parametrize("miss", ["auto", "cpu"])
def test_the_cpu_computes_from_stored_bytes(
    folder: Callable[[str], Path], name: str, miss: str
) -> None:
    """Law: whichever way misses go, logits are those of the dequantised model."""
    ours, theirs = load(folder(name), miss=miss, dtype=F32), load_dequantised(folder(name), F32)
    ids = prompt(2, 12)
    for _ in range(3):
        torch.testing.assert_close(logits_of(ours, ids), logits_of(theirs, ids), **CLOSE)
    assert tiers_of(ours)["misses_computed"] > 0


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "expert_memory"), [("fp8", "35%"), ("mxfp4", "35%"), ("mxfp4", "100%")]
)
def test_products_read_stored_bytes(
    machine: FakeMachine, folder: Callable[[str], Path], name: str, expert_memory: str
) -> None:
    """Law: Triton's products read quantised slots in place, resident ones without any sync."""
    ours = load(folder(name), expert_memory=expert_memory, miss="copy", dtype=F32)
    theirs = load_dequantised(folder(name), F32)
    hidden_TD = torch.randn(2, ours.config.hidden_size, generator=torch.Generator().manual_seed(0))
    inputs = hidden_TD, torch.tensor([[3, 0], [5, 3]]), torch.tensor([[0.5, 0.2], [0.3, 0.6]])
    with torch.no_grad():
        found, expected = (m.model.layers[1].mlp.experts(*inputs) for m in (ours, theirs))
    torch.testing.assert_close(found, expected, **CLOSE)
    handle = moe_runtime.handle(ours)
    settings, budget = handle.report()["settings"], handle.budget
    assert settings["experts"].startswith("triton")
    assert settings["dequant"] == "triton, in its products"
    assert budget.slot_bytes == handle.engine.tensor_map.slot_bytes
    assert budget.kind.room_bytes == 0
    assert budget.holds_all == (expert_memory == "100%")
    assert tiers_of(ours)["syncs"] == machine.num_waits == (0 if budget.holds_all else 1)
    handle.close()
    assert machine.is_idle


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_restore_gives_the_dequantised_model(
    folder: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: restore() dequantises on the device one by one, also where products needed no room."""
    monkeypatch.setattr(device_tiers, "find_dequantizer", lambda *_: TorchDequantizer())
    ours, theirs = load(folder(name)), load_dequantised(folder(name))
    moe_runtime.handle(ours).restore()
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


@pytest.mark.usefixtures("no_triton", "machine")
def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    """Law: it stops whoever needs that expert when it is read, with tensor and file."""
    name = "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv"
    path = save_fp8(tmp_path / "model")
    tensors = tensors_of(path)
    tensors[name].fill_(float("nan"))
    resave(path, tensors)
    model = load(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{name} \(.* in model.safetensors\) holds a"):
            logits_of(model, prompt(4, 60))
    moe_runtime.handle(model).close()


@pytest.fixture
def unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that can unpack; Triton's interpreter would take seconds an expert."""
    for module in (device_tiers, load_module):
        monkeypatch.setattr(module, "find_unpack", lambda device: cpu_unpack)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Family -> a bf16 checkpoint and the same one packed, made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def folders_of(family: str) -> tuple[Path, Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            made[family] = root / "model", root / "packed"
            tiny_model(family).to(BF16).save_pretrained(root / "model")
            pack_model(*made[family])
        return made[family]

    return folders_of


@pytest.mark.usefixtures("no_triton", "unpacking")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("miss", ["copy", "cpu"])
def test_packed_experts_have_the_bits_of_unpacked_ones(
    machine: FakeMachine, packed: Callable[[str], tuple[Path, Path]], family: str, miss: str
) -> None:
    """Law: whichever way misses go, with fewer bytes in host memory and over the link."""
    settings = {"miss": miss, "host_memory": "100%"}
    folder, packed_folder = packed(family)
    ours = load(packed_folder, **settings)
    # As many slots: an expert that the CPU computes may differ in rounding.
    budget = moe_runtime.handle(ours).budget
    plain = load(folder, expert_memory=budget.num_slots * budget.slot_bytes, **settings)
    for num_rows, num_tokens in ((2, 12), (1, 1), (1, 60)):
        ids = prompt(num_rows, num_tokens, seed=num_tokens)
        assert torch.equal(logits_of(ours, ids), logits_of(plain, ids))
    handle, theirs = moe_runtime.handle(ours), moe_runtime.handle(plain)
    slots, host_slots = handle.engine.device_slots, handle.engine.host_slots
    assert slots.slot_bytes == theirs.engine.device_slots.slot_bytes
    assert host_slots.slot_bytes < theirs.engine.host_slots.slot_bytes
    found, expected = tiers_of(ours), tiers_of(plain)
    moved, wanted = (t["misses_copied"] + t["prefetched"] for t in (found, expected))
    assert found["bytes_copied"] / moved < 0.97 * expected["bytes_copied"] / wanted
    assert (found["misses_computed"] > 0) == (miss == "cpu")
    report = handle.report()["settings"]
    assert (report["expert_slots"], report["unpack"]) == ("unpacked", "triton, on arrival")
    assert "packed in pinned host memory" in handle.placement()
    assert budget.used_bytes <= budget.budget_bytes
    assert budget.kind.room_bytes == 2 * host_slots.slot_bytes
    handle.close()
    theirs.close()
    assert machine.is_idle


@pytest.mark.usefixtures("machine", "no_triton")
def test_packed_experts_without_a_kernel(
    packed: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: where nothing unpacks on the device they are unpacked when read, or refused if asked."""
    for module in (device_tiers, load_module):
        monkeypatch.setattr(module, "find_unpack", lambda device: None)
    plain, ours = (load(folder) for folder in packed("mixtral"))
    ids = prompt(1, 6)
    assert torch.equal(logits_of(ours, ids), logits_of(plain, ids))
    host_slots = [moe_runtime.handle(m).engine.host_slots.slot_bytes for m in (ours, plain)]
    assert host_slots[0] == host_slots[1]
    with pytest.raises(UnsupportedModelError, match=r"expert_slots='packed' needs .* Triton to un"):
        load(packed("mixtral")[1], expert_slots="packed")


@pytest.mark.usefixtures("machine", "no_triton", "unpacking")
def test_how_packed_experts_lie_on_the_host_can_be_said(
    packed: Callable[[str], tuple[Path, Path]],
) -> None:
    """Law: 'unpacked' keeps them so from the disk on; 'packed' and all of them fit in '100%'."""
    model = load(packed("mixtral")[1], expert_slots="unpacked")
    slots = moe_runtime.handle(model).engine
    assert slots.host_slots.slot_bytes == slots.device_slots.slot_bytes
    handle = moe_runtime.handle(
        load(packed("mixtral")[1], expert_memory="100%", expert_slots="packed")
    )
    assert handle.budget.holds_all
    assert handle.engine.host_slots.slot_bytes < handle.engine.device_slots.slot_bytes
    with pytest.raises(UnsupportedModelError, match="expert_dtype='int8' is for slots in host mem"):
        load(packed("mixtral")[1], expert_dtype="int8")


@pytest.mark.usefixtures("machine", "no_triton")
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_floors_of_stored_experts(folder: Callable[[str], Path], name: str) -> None:
    """Law: the smallest memory of device and host that errors name is enough."""
    for option in ("expert_memory", "host_memory"):
        with pytest.raises(BudgetError, match=f"set {option}=") as caught:
            load(folder(name), **{option: 1})
        floor = int(str(caught.value).split(f"{option}=")[1].split()[0])
        model = load(folder(name), miss="cpu", **{option: floor})
        logits_of(model, prompt(1, 4))
        moe_runtime.handle(model).close()
