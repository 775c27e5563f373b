"""A spec counts what transformers builds: parameters, experts and cached values."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.integrations.transformers.spec_reader import (
    read_spec,
    spec_of_fields,
    spec_of_folder,
)
from moe_runtime.measure.inspection import inspect_model
from moe_runtime.model_preset import FOLDER, preset_names, read_model_preset

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "moe_runtime" / "demo" / "mixtral-stdlib"
DEEPSEEK = ROOT / "tests" / "data" / "deepseek-stdlib"
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3,
    "vocab_size": 11, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_a_spec_has_the_parameters_that_transformers_counts(name: str) -> None:
    preset = read_model_preset(FOLDER / f"{name}.yaml")
    config = AutoConfig.for_model(preset.model_type, **preset.fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = sum(tensor.numel() for key, tensor in model.named_parameters() if ".experts." in key)
    spec = read_spec(name)
    assert spec.num_parameters == model.num_parameters()
    assert spec.expert_parameters == experts


@pytest.mark.parametrize("folder", [DEMO, DEEPSEEK], ids=lambda path: path.name)
def test_a_spec_of_a_folder_is_what_inspect_finds(folder: Path) -> None:
    spec, found = spec_of_folder(folder), inspect_model(folder)
    assert spec.expert_bytes == found.expert_bytes
    assert spec.num_experts == found.num_experts
    assert spec.kv_bytes_per_token == found.kv_cache.bytes_per_token  # type: ignore[union-attr]
    # Buffers are no parameters: rotary frequencies, and what balances DeepSeek's router.
    assert 0 <= found.dense_bytes - spec.dense_bytes < 2000
    assert resolve_model(folder).config.model_type == spec.family


def test_windows_stop_the_cache_from_growing() -> None:
    spec = spec_of_fields("m", {**MIXTRAL, "sliding_window": 5})
    assert spec.kv_bytes(5) == 5 * spec.kv_bytes_per_token == spec.kv_bytes(500)
    oss = read_spec("gpt-oss-20b")
    per_layer = oss.kv_bytes_per_token // len(oss.layers)
    assert oss.kv_bytes(1000) == per_layer * (1000 * 12 + 128 * 12)


def test_latent_attention_caches_latent_vectors() -> None:
    assert read_spec("deepseek-v3").kv_bytes(1) == 2 * 61 * (512 + 64)


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("gpt-oss-20b", 10.2), ("deepseek-v3", 654.1), ("olmoe-1b-7b", 12.9)]
)
def test_experts_have_the_bytes_of_their_format(name: str, gigabytes: float) -> None:
    assert read_spec(name).expert_total_bytes / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_operations_of_a_token_are_two_a_parameter_that_it_uses() -> None:
    spec = read_spec("mixtral-8x7b")
    parts = spec.flops_per_token(100)
    used = spec.dense_parameters - spec.embedding_parameters + spec.expert_parameters // 4
    assert sum(parts.values()) - parts["attention_scores"] == 2 * used
    assert parts["attention_scores"] == 2 * 100 * 32 * 2 * 4096
    assert spec.dense_flops + spec.expert_flops == 2 * used


def test_experts_that_several_tokens_use_together_lie_between_one_tokens_and_all() -> None:
    spec = read_spec("olmoe-1b-7b")
    assert spec.active_experts(1) == pytest.approx(spec.experts_per_token)
    assert spec.experts_per_token < spec.active_experts(4) < spec.num_experts
    assert spec.active_experts(10_000) == pytest.approx(spec.num_experts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_local_experts": None}, "has no layers with experts"),
        ({"num_experts_per_tok": 9}, "uses 9 of 4 experts a token"),
        ({"hidden_size": "8"}, "hidden_size ('8') must be a whole number"),
        ({"hidden_size": True}, "hidden_size (True) must be a whole number"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantised with awq"),
        ({"dtype": "float64"}, "is in dtype 'float64'"),
    ],
)
def test_what_cannot_be_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of_fields("m", {**MIXTRAL, **change})
    assert said in str(caught.value)


def test_a_damaged_config_is_named_with_its_file(tmp_path: Path) -> None:
    shutil.copy(DEMO / "config.json", tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"config\.json is not sound JSON"):
        read_spec(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold an object"):
        read_spec(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_spec(str(tmp_path))


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="the nearest is olmoe-1b-7b"):
        read_spec("olmo-1b-7b")
    with pytest.raises(CheckpointError, match=r"is no folder; give a folder .* presets dbrx"):
        read_spec("some/where")


def test_a_family_that_is_not_known_says_what_is_not_counted() -> None:
    spec = spec_of_fields("m", {**MIXTRAL, "model_type": "brand_new"})
    assert "brand_new is counted as a common decoder" in spec.assumptions[0]
    assert not spec_of_fields("m", MIXTRAL).assumptions


def test_a_packed_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert not spec_of_folder(tmp_path).is_packed
    (tmp_path / "packing.json").write_text("{}")
    assert spec_of_folder(tmp_path).is_packed
