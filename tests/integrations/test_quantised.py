"""Quantised checkpoints run as they are: transformers' dequantised model, in a fraction of memory.

The reference is transformers' own dequantised model on the CPU, eager; where it cannot read a
checkpoint (fp8 whose last squares are cut), one that was dequantised square by square.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_runtime
from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.expert import ExpertKey
from moe_runtime.integrations.gguf import write_gguf
from moe_runtime.integrations.transformers.pack import pack_model
from moe_runtime.measure.inspection import inspect_model
from moe_runtime.memory.compact_slots import CompactSlots
from moe_runtime.memory.disk import DiskReader
from moe_runtime.memory.layout import BLOCK_BYTES
from tests.command_line import run_here
from tests.quantised_checkpoints import (
    CUT,
    FP8,
    WHOLE,
    change_config,
    load_dequantised,
    resave,
    save_dequantised,
    save_fp8,
    save_mxfp4,
    tensors_of,
)
from tests.tiny_models import load_unmodified, logits_of, prompt

NUM_EXPERTS = 8
FEW = "35%"
BF16, F32 = torch.bfloat16, torch.float32
BOTH = ["fp8", "mxfp4"]

pytestmark = pytest.mark.filterwarnings("ignore:.*expert slots are fewer")

Tensors = dict[str, torch.Tensor]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> a checkpoint, made once: `fp8`, `fp8_cut`, `fp8_qwen` or `mxfp4`."""
    made: dict[str, Path] = {}
    makers: dict[str, Callable[[Path], Path]] = {
        "fp8": save_fp8,
        "fp8_cut": lambda folder: save_fp8(folder, CUT),
        "fp8_qwen": lambda folder: save_fp8(folder, family="qwen3_moe"),
        "mxfp4": save_mxfp4,
    }

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = makers[name](tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return folder_of


@pytest.fixture
def copy(folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Name -> a checkpoint to be damaged."""
    return lambda name: Path(shutil.copytree(folder(name), tmp_path / "model"))


def load(path: Path, **settings: Any) -> PreTrainedModel:
    return moe_runtime.load(path, **{"expert_memory": FEW} | settings)


def greedy(model: PreTrainedModel, ids: torch.Tensor, num_tokens: int = 12) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    return found


def same_outputs(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    for num_rows, num_tokens in ((1, 1), (2, 12), (1, 60)):
        ids = prompt(num_rows, num_tokens, seed=num_tokens)
        assert torch.equal(logits_of(ours, ids), logits_of(theirs, ids))
    assert torch.equal(greedy(ours, prompt(2, 12)), greedy(theirs, prompt(2, 12)))


@pytest.mark.parametrize("name", ["fp8", "fp8_qwen", "mxfp4"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_exact_outputs_are_those_of_transformers(
    folder: Callable[[str], Path], name: str, dtype: torch.dtype
) -> None:
    """Law: with exact=True logits and greedy tokens equal the dequantised model's in every bit."""
    ours = load(folder(name), exact=True, dtype=dtype)
    assert moe_runtime.handle(ours).budget.num_slots < 3 * NUM_EXPERTS  # there are evictions
    same_outputs(ours, load_dequantised(folder(name), dtype))
    assert moe_runtime.handle(ours).report()["cache"]["misses"] > 3 * NUM_EXPERTS


def test_large_values_are_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: what is dequantised elsewhere may stand in its slot as in its file, exact or not."""
    large = {"hidden_size": 512, "moe_intermediate_size": 1536, "num_hidden_layers": 2}
    folder = save_fp8(tmp_path / "model", WHOLE | large)
    in_place: list[bool] = []
    real = DiskReader._read_in_place

    def watched(self: DiskReader, *arguments: Any) -> bool:
        in_place.append(real(self, *arguments))
        return in_place[-1]

    monkeypatch.setattr(DiskReader, "_read_in_place", watched)
    ours = load(folder, exact=True, expert_memory="50%")
    same_outputs(ours, load_dequantised(folder))
    assert in_place
    reader = moe_runtime.handle(ours).engine.reader
    if reader.is_direct and max(f.block_bytes for f in reader._files.values()) == BLOCK_BYTES:
        assert all(in_place)


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_fast_outputs(folder: Callable[[str], Path], name: str) -> None:
    """Law: without `exact` greedy tokens in float32 are those of the dequantised model."""
    ours, theirs = load(folder(name), dtype=F32), load_dequantised(folder(name), F32)
    assert torch.equal(greedy(ours, prompt(2, 12)), greedy(theirs, prompt(2, 12)))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_cut_squares(folder: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """Law: sides that 128 does not divide are read as the format says; transformers 5.23 cannot."""
    assert tensors_of(folder("fp8_cut"))["model.layers.1.mlp.experts.0.gate_proj.weight"].shape == (
        CUT["moe_intermediate_size"],
        CUT["hidden_size"],
    )
    reference = save_dequantised(folder("fp8_cut"), tmp_path / "reference")
    ours = load(folder("fp8_cut"), exact=True, dtype=dtype)
    same_outputs(ours, load_unmodified(reference, dtype))


def test_auto_dtype_is_that_of_the_config(folder: Callable[[str], Path]) -> None:
    """Law: what is not said is as transformers has it, and a config's attribute can be set."""
    for name in BOTH:
        model = load(folder(name), output_router_logits=True)
        assert {parameter.dtype for parameter in model.parameters()} == {BF16}
        assert model.config.output_router_logits is True
        assert not hasattr(model.config, "quantization_config")


# Memory


@pytest.mark.parametrize("name", BOTH)
def test_slots_hold_experts_as_they_are_stored(folder: Callable[[str], Path], name: str) -> None:
    """Law: a slot is the bytes of one expert in the file, to the byte, and their alignment."""
    path = folder(name)
    model = load(path, expert_memory="100%")
    handle = moe_runtime.handle(model)
    logits_of(model, prompt(2, 60))
    budget, slots = handle.budget, handle.engine.slots
    assert budget.holds_all
    assert f", {name}) on disk, all at a time" in handle.placement()
    assert isinstance(slots, CompactSlots)
    tensors = tensors_of(path)
    prefix = "model.layers.1.mlp.experts."
    experts = {n: t for n, t in tensors.items() if n.startswith(prefix)}
    stored_bytes = sum(t.nbytes for t in experts.values()) // NUM_EXPERTS
    layer = next(i for i, site in enumerate(handle.sites) if f"{site.name}." == prefix)
    key = ExpertKey(layer, 3)
    layout = handle.engine.blobs.layout(key).as_read
    assert layout.weight_bytes == stored_bytes
    assert stored_bytes <= budget.slot_bytes < stored_bytes + 64 * 2 * len(layout.parameters)
    found = layout.views(torch.from_numpy(slots.blob(handle.engine.cache.slot(key))))
    places = handle.engine.tensor_map.layers[layer].parameters
    for spec in layout.parameters:
        (source,) = {box.source.name for box in places[spec.name].select(0, key.expert).boxes}
        stored = tensors[source] if name == "fp8" else tensors[source][key.expert].contiguous()
        assert torch.equal(found[spec.name].view(torch.uint8), stored.view(torch.uint8))


def test_the_same_memory_holds_more_experts(folder: Callable[[str], Path]) -> None:
    """Law: twice the experts of bf16 in fp8, 3.7 times in mxfp4, less the room of `exact`."""
    for name, ratio in (("fp8", 1.98), ("mxfp4", 3.5)):
        model = load(folder(name), expert_memory="100%", exact=True)
        budget = moe_runtime.handle(model).budget
        computed_bytes = budget.kind.room_bytes
        assert computed_bytes / budget.slot_bytes > ratio
        assert budget.used_bytes == budget.num_slots * budget.slot_bytes + computed_bytes
        assert budget.used_bytes <= budget.budget_bytes


# Other commands


def test_inspect(folder: Callable[[str], Path], capsys: Capsys) -> None:
    """Law: the figures are those of load(), and the report says what is quantised."""
    for name in BOTH:
        found = inspect_model(folder(name))
        budget = moe_runtime.handle(load(folder(name), expert_memory="100%")).budget
        assert (found.quantisation, found.dtype) == (name, "bfloat16")
        assert found.slot_bytes == budget.slot_bytes
        assert found.expert_total_bytes == budget.expert_total_bytes
        assert found.floor_bytes == budget.floor_bytes
        assert found.checkpoint_bytes == (folder(name) / "model.safetensors").stat().st_size
        load(folder(name), expert_memory=found.floor_bytes)
    text = run_here(capsys, "inspect", folder("mxfp4")).out
    assert "experts mxfp4 in files and memory" in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "mode"), [("fp8", "fast"), ("fp8_cut", "exact"), ("mxfp4", "fast")]
)
def test_check(folder: Callable[[str], Path], capsys: Capsys, name: str, mode: str) -> None:
    """Law: `generate --check` compares with the dequantised model in a process of its own."""
    options = ["--exact"] if mode == "exact" else []
    outcome = run_here(
        capsys, "generate", folder(name), "--json", "--check", "--expert-memory", FEW,
        "--prompt", "def main", "--max-new-tokens", "12", *options,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["parity"]["mode"] == mode
    assert "dequantised" in found["parity"]["reference"]
    assert found["settings"]["quantisation"] == name.partition("_")[0]


def test_trace_record(folder: Callable[[str], Path], capsys: Capsys, tmp_path: Path) -> None:
    """Law: routing is recorded from quantised experts as from any."""
    trace, prompts = tmp_path / "trace.npz", tmp_path / "prompts.txt"
    prompts.write_text("def main\n")
    outcome = run_here(
        capsys, "trace", "record", folder("mxfp4"), "-o", trace, "--prompts", prompts,
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert trace.stat().st_size > 0


def test_restore_gives_the_dequantised_model(folder: Callable[[str], Path]) -> None:
    """Law: restore() leaves transformers' dequantised model, weights and all."""
    for name in BOTH:
        ours, theirs = load(folder(name)), load_dequantised(folder(name))
        moe_runtime.handle(ours).restore()
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        for key, value in ours.state_dict().items():
            assert torch.equal(value, state[key]), key


def test_what_is_quantised_already_is_not_packed(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in BOTH:
        with pytest.raises(UnsupportedModelError, match=f"quantised .{name}.*nothing to pack"):
            pack_model(folder(name), tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
        with pytest.raises(UnsupportedModelError, match=f"is quantised .{name}., and GGUF"):
            write_gguf(folder(name), tmp_path / "model.gguf")


def test_settings_without_effect_are_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(TypeError, match="quantization_config has no effect"):
        load(folder("fp8"), quantization_config=FP8)
    with pytest.raises(UnsupportedModelError, match="expert_slots='packed' needs"):
        load(folder("fp8"), expert_slots="packed")


def test_a_quantised_model_in_memory_is_refused(folder: Callable[[str], Path]) -> None:
    """Law: offload() takes ordinary weights; what it says names the dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder("mxfp4"), dtype=BF16)
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(
        experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"is torch.float8_e4m3fn, which is not supp"):
        moe_runtime.offload(model)


# Bad input


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", None])
def test_other_methods_are_named(copy: Callable[[str], Path], method: str | None) -> None:
    path = copy("fp8")
    change_config(path, quantization_config={"quant_method": method, "bits": 4})
    expected = rf"quantised \({method or 'unknown method'}\).*fp8 as .*mxfp4 as .* are"
    with pytest.raises(UnsupportedModelError, match=expected):
        load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_block_size", [64, 64]),
        ("weight_block_size", None),
        ("fmt", "e5m2"),
        ("activation_scheme", "static"),
    ],
)
def test_other_settings_of_fp8_are_named(
    copy: Callable[[str], Path], key: str, value: object
) -> None:
    path = copy("fp8")
    change_config(path, quantization_config=FP8 | {key: value})
    with pytest.raises(UnsupportedModelError, match=rf"quantization_config.{key} = .*supported"):
        load(path)


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
DENSE = "model.layers.0.self_attn.o_proj.weight"
UP = "model.layers.1.mlp.experts.gate_up_proj"
DAMAGES: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "fp8: no scales": ("fp8", lambda t: t.pop(f"{GATE}_scale_inv"), rf"{GATE} .* needs {GATE}_sc"),
    "fp8: no values": ("fp8", lambda t: t.pop(GATE), rf"{GATE}_scale_inv .* needs {GATE},"),
    "fp8: dense, no scales": ("fp8", lambda t: t.pop(f"{DENSE}_scale_inv"), f"{DENSE} .* needs"),
    "fp8: shape of scales": (
        "fp8",
        lambda t: t.update({f"{GATE}_scale_inv": torch.ones(2, 2)}),
        rf"{GATE}_scale_inv \(F32 \[2, 2\] in model.* must be F32 \[1, 1\], one scale for each 128",
    ),
    "fp8: dtype of scales": (
        "fp8",
        lambda t: t.update({f"{GATE}_scale_inv": torch.ones(1, 1).to(torch.uint8)}),
        rf"{GATE}_scale_inv \(U8 .* must be F32",
    ),
    "fp8: not fp8": (
        "fp8",
        lambda t: t.update({GATE: t[GATE].bfloat16()}),
        rf"{GATE}_scale_inv .* scales {GATE} \(BF16 .*should be F8_E4M3",
    ),
    "fp8: one expert plain": (
        "fp8",
        lambda t: (t.update({GATE: t[GATE].bfloat16()}), t.pop(f"{GATE}_scale_inv")),
        r"disagree in dtype",
    ),
    "fp8: shape of an expert": (
        "fp8",
        lambda t: t.update({GATE: t[GATE][:100].clone()}),
        r"layers.1.mlp.experts",
    ),
    "mxfp4: no scales": ("mxfp4", lambda t: t.pop(f"{UP}_scales"), f"{UP}_blocks .* needs {UP}_s"),
    "mxfp4: no blocks": ("mxfp4", lambda t: t.pop(f"{UP}_blocks"), f"{UP}_scales .* needs {UP}_b"),
    "mxfp4: shape of scales": (
        "mxfp4",
        lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][:, :5].clone()}),
        rf"{UP}_scales \(U8 \[8, 5, 3\] in model.* must be U8 \[8, 128, 3\]",
    ),
    "mxfp4: shape of blocks": (
        "mxfp4",
        lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"].flatten(2)}),
        rf"{UP}_blocks \(U8 .* must be U8 \[experts, rows, groups, 16\]",
    ),
    "mxfp4: other width": (
        "mxfp4",
        lambda t: t.update(
            {n: t[n][:, :, :1].clone() for n in (f"{UP}_blocks", f"{UP}_scales")}
        ),
        rf"{UP} must have shape \[8, 96, 128\] .* make \[8, 32, 128\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_that_headers_show(copy: Callable[[str], Path], damage: str) -> None:
    """Law: one line before any weight is read, with tensor and file."""
    name, act, message = DAMAGES[damage]
    path = copy(name)
    tensors = tensors_of(path)
    act(tensors)
    resave(path, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "model.safetensors" in str(caught.value) or str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("fp8", f"{GATE}_scale_inv", float("nan")),
        ("fp8", f"{GATE}_scale_inv", float("inf")),
        ("mxfp4", f"{UP}_scales", 255),
    ],
)
def test_a_scale_that_is_no_number(
    copy: Callable[[str], Path], name: str, tensor: str, value: float
) -> None:
    """Law: it stops whoever uses that expert, with tensor and file; other experts go on."""
    path = copy(name)
    tensors = tensors_of(path)
    tensors[tensor].view(-1)[-1] = value  # of mxfp4, the last expert's
    resave(path, tensors)
    model = load(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{tensor} \(.* in model.safetensors\) holds a"):
            logits_of(model, prompt(4, 60))
    moe_runtime.handle(model).close()


def test_a_dense_scale_that_is_no_number(copy: Callable[[str], Path]) -> None:
    path = copy("fp8")
    tensors = tensors_of(path)
    tensors[f"{DENSE}_scale_inv"].fill_(float("nan"))
    resave(path, tensors)
    with pytest.raises(CheckpointError, match=rf"{DENSE}_scale_inv \(.*holds a scale that is no n"):
        load(path)
