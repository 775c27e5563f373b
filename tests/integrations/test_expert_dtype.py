"""int8 and int4 experts: lossy by choice, near the model, the same whatever was cached."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_runtime
from moe_runtime.errors import ExpertReadError, OffloadedExpertsError, UnsupportedModelError
from moe_runtime.integrations.transformers import fast
from moe_runtime.integrations.transformers.pack import pack_model
from moe_runtime.kernels.cpu.experts import CpuExperts
from moe_runtime.kernels.quantise import QUANTISED_DTYPES, QuantisedDtype, dequantise, quantise
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.packing import PackedTensor
from tests.command_line import run_here
from tests.tiny_checkpoint import change_config, save_mixtral
from tests.tiny_models import logits_of, prompt, tiny_model

Capsys = pytest.CaptureFixture[str]

# Fused and module by module, and a conversion that rearranges; no biases, not transposed.
FAMILIES = ["mixtral", "granitemoe", "deepseek_v3"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Mixtral whose weights have the sizes that training gives."""
    folder = tmp_path_factory.mktemp("source") / "model"
    save_mixtral(folder, hidden_size=64, intermediate_size=96)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    change_config(folder, dtype="bfloat16")
    model.save_pretrained(folder)
    return folder


def load(
    folder: Path, expert_dtype: str = "auto", memory: str = "60%", **more: object
) -> PreTrainedModel:
    return moe_runtime.load(folder, expert_dtype=expert_dtype, expert_memory=memory, **more)  # type: ignore[arg-type]


def rounded(folder: Path, dtype: QuantisedDtype, target: Path) -> Path:
    """The checkpoint with its experts rounded there and back, as bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, value in model.named_parameters():
        if ".experts." in name:
            for w in value.data:
                dequantise(*quantise(w.contiguous(), dtype), dtype, w)
    model.save_pretrained(target)
    return target


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the median position: where experts are nearly tied, any rounding decides."""
    rows = (found - expected).flatten(0, -2).norm(dim=1) / expected.flatten(0, -2).norm(dim=1)
    return float(rows.median())


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
@pytest.mark.parametrize("has_kernel", [True, False])
def test_outputs_are_those_of_rounded_weights(
    dtype: QuantisedDtype,
    has_kernel: bool,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Law: with the kernel and with torch, for a token and prompts with many rows an expert."""
    if not has_kernel:
        monkeypatch.setattr(fast.CpuExperts, "load", lambda *_, **__: None)
    elif CpuExperts.load(torch.bfloat16) is None:
        pytest.skip(CpuExperts.status())
    like = load(rounded(saved, dtype, tmp_path / "rounded"))
    model = load(saved, dtype)
    for ids in (torch.tensor([[7]]), torch.arange(3, 63).view(2, 30)):
        expected, found = logits_of(like, ids).float(), logits_of(model, ids).float()
        # Scales are applied to sums here and to weights there, which bfloat16 rounds once more.
        assert distance(found, expected) < 0.03
    assert distance(found, logits_of(load(saved), ids).float()) > 0


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: str, tmp_path: Path) -> None:
    """Law: the bits do not depend on how many experts are held, nor on the packing on disk."""
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    pack_model(folder, tmp_path / "packed")
    ids = prompt()
    expected = logits_of(load(folder, dtype, "100%"), ids)
    for source in (folder, tmp_path / "packed"):
        model = load(source, dtype, "25%")
        moe_runtime.handle(model).engine._poison = True
        assert torch.equal(logits_of(model, ids), expected)
    assert 0 < distance(expected.float(), logits_of(load(folder), ids).float()) < 0.5


def test_more_experts_fit(saved: Path) -> None:
    """Law: twice and about 3.5 times as many slots of the same memory, and the report says so."""
    slots = {}
    for dtype in ("auto", *QUANTISED_DTYPES):
        handle = moe_runtime.handle(load(saved, dtype, "25%"))
        report = handle.report()
        slots[dtype] = report["cache"]["slot_bytes"]
        name = "unpacked" if dtype == "auto" else dtype
        assert report["settings"]["expert_slots"] == name
        assert handle.budget.used_bytes <= handle.budget.budget_bytes
        if dtype != "auto":
            assert f"from {dtype} slots" in report["settings"]["experts"]
            assert f"of {dtype} slots" in handle.placement()
    assert slots["auto"] / slots["int8"] > 1.85  # scales and cache lines weigh more in small rows
    assert slots["auto"] / slots["int4"] > 3.4


def test_it_is_said_and_cannot_be_exact(saved: Path) -> None:
    with pytest.warns(UserWarning, match="experts are rounded to int8 when they are read"):
        model = load(saved, "int8")
    with pytest.raises(OffloadedExpertsError, match="were rounded to int8 cannot be restored"):
        moe_runtime.handle(model).restore()
    with pytest.raises(ValueError, match="expert_dtype='int8' changes the weights and exact=True"):
        load(saved, "int8", exact=True)
    with pytest.raises(ValueError, match="expert_dtype 'fp8' is unknown; choose from auto, int8"):
        load(saved, "fp8")
    with pytest.raises(ValueError, match="so does expert_slots='packed'"):
        load(saved, "int8", expert_slots="packed")


def test_what_cannot_be_rounded_is_refused(saved: Path, tmp_path: Path) -> None:
    """Law: float32 experts, transposed ones, and odd rows of int4."""
    with pytest.raises(UnsupportedModelError, match="takes experts in bfloat16"):
        load(saved, "int8", dtype=torch.float32)
    tiny_model("gpt_oss").to(torch.bfloat16).save_pretrained(tmp_path / "transposed")
    with pytest.raises(UnsupportedModelError, match="holds its weights transposed"):
        load(tmp_path / "transposed", "int8")
    save_mixtral(tmp_path / "odd", intermediate_size=41)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "odd", dtype=torch.bfloat16)
    change_config(tmp_path / "odd", dtype="bfloat16")
    model.save_pretrained(tmp_path / "odd")
    with pytest.raises(UnsupportedModelError, match="rows of down_proj have 41; use expert_dtype"):
        load(tmp_path / "odd", "int4")


def test_an_altered_packed_expert_is_refused(saved: Path, tmp_path: Path) -> None:
    """Law: packed files are checked before their rows are rounded."""
    packed = tmp_path / "packed"
    pack_model(saved, packed)
    (file,) = packed.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    for tensor in Checkpoint.open(packed).values():
        if isinstance(tensor, PackedTensor):
            raw[tensor.packed_offset + 200] ^= 4
    file.write_bytes(raw)
    model = load(packed, "int8")
    with pytest.raises(ExpertReadError, match=r"was altered: the checksum .* at offset \d+"):
        model(torch.tensor([[7]]))


def test_generate_says_that_it_is_lossy(capsys: Capsys, saved: Path) -> None:
    """Law: on stderr, in the settings, and in the verdict of a check, which it cannot pass."""
    words = ("generate", saved, "--prompt", "def f(a, b):", "--max-new-tokens", "4", "--json")
    outcome = run_here(capsys, *words, "--expert-dtype", "int8", "--expert-memory", "60%")
    assert outcome.code == 0, outcome.err
    assert "experts are rounded to int8" in outcome.err
    settings = json.loads(outcome.out)["settings"]
    assert settings["expert_dtype"] == settings["expert_slots"] == "int8"
    outcome = run_here(capsys, *words, "--expert-dtype", "int8", "--exact")
    assert outcome.code != 0
    assert "leave out one of them" in outcome.err
