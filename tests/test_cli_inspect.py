"""`moe-runtime inspect` says what a checkpoint needs, from its config and headers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from moe_runtime.integrations.transformers import load as load_module
from moe_runtime.memory import read_tensor
from tests.command_line import run_here
from tests.tiny_checkpoint import NUM_EXPERTS, NUM_LAYERS, TOP_K, save_mixtral
from tests.tiny_models import tiny_model

EXPERT_BYTES = 3 * 32 * 40 * 4

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("inspect") / "model")


def inspect(capsys: Capsys, model: Path, *options: str) -> dict[str, Any]:
    outcome = run_here(capsys, "inspect", model, "--json", *options)
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_figures_follow_from_the_config(capsys: Capsys, model: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    found = inspect(capsys, model)
    kv_bytes = NUM_LAYERS * 2 * config.num_key_value_heads * (32 // 4) * 4
    expected = {
        "family": "mixtral", "architecture": "MixtralForCausalLM", "dtype": "float32",
        "num_layers": NUM_LAYERS, "num_moe_layers": NUM_LAYERS, "experts_per_layer": NUM_EXPERTS,
        "top_k": TOP_K, "num_experts": NUM_LAYERS * NUM_EXPERTS, "expert_bytes": EXPERT_BYTES,
        "kv_bytes_per_token": kv_bytes, "kv_windows": [], "kv_state_bytes": 0,
        "context_tokens": config.max_position_embeddings, "num_files": 1,
        "checkpoint_bytes": (model / "model.safetensors").stat().st_size,
        "expert_layout": "per expert",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["slot_bytes"] >= EXPERT_BYTES
    assert found["expert_total_bytes"] == found["num_experts"] * found["slot_bytes"]
    assert found["floor_bytes"] == TOP_K * found["slot_bytes"]
    assert found["hitting_bytes"] == NUM_LAYERS * TOP_K * found["slot_bytes"]


def test_the_smallest_budget_runs_and_one_byte_less_does_not(capsys: Capsys, model: Path) -> None:
    floor = inspect(capsys, model)["floor_bytes"]
    words = ("generate", model, "--prompt", "a", "--max-new-tokens", "2", "--expert-memory")
    assert run_here(capsys, *words, str(floor)).code == 0
    assert f"set expert_memory={floor} or more" in run_here(capsys, *words, str(floor - 1)).error()


def test_dense_bytes_are_those_of_the_loaded_model(capsys: Capsys, model: Path) -> None:
    words = ("generate", model, "--prompt", "a", "--max-new-tokens", "1", "--json")
    memory = json.loads(run_here(capsys, *words).out)["memory"]
    found = inspect(capsys, model)
    assert found["dense_bytes"] == memory["dense_bytes"]
    assert found["lookup_bytes"] == memory["mapped_bytes"] > 0
    assert found["expert_total_bytes"] == memory["expert_total_bytes"]


def test_dtype_changes_the_bytes(capsys: Capsys, model: Path) -> None:
    found = inspect(capsys, model, "--dtype", "bfloat16")
    assert found["dtype"] == "bfloat16"
    assert found["expert_bytes"] == EXPERT_BYTES // 2


def test_no_weight_is_read(capsys: Capsys, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(read_tensor, "read_tensor", refuse)
    monkeypatch.setattr(load_module, "read_tensor", refuse)
    assert inspect(capsys, model)["family"] == "mixtral"


@pytest.mark.parametrize(
    ("family", "layout"),
    [("gpt_oss", "fused"), ("qwen3_next", "per expert"), ("deepseek_v3", "per expert")],
)
def test_other_kinds_of_layers(capsys: Capsys, tmp_path: Path, family: str, layout: str) -> None:
    """Law: windows, states and latent attention are told apart; cached bytes are transformers'."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    found = inspect(capsys, tmp_path)
    assert found["family"] == family
    assert found["expert_layout"] == layout
    assert found["kv_bytes_per_token"] > 0
    config = model.config
    if family == "gpt_oss":
        assert found["kv_windows"] == [config.sliding_window]
        layer_bytes = 2 * config.num_key_value_heads * config.head_dim * 4
        sliding = config.layer_types.count("sliding_attention")
        assert found["kv_bytes_per_token"] == config.num_hidden_layers * layer_bytes
        assert found["kv_window_bytes_per_token"] == sliding * layer_bytes
    if family == "qwen3_next":
        assert found["kv_state_bytes"] > 0
    if family == "deepseek_v3":
        assert found["num_moe_layers"] == config.num_hidden_layers - config.first_k_dense_replace


def test_the_table_says_the_same(capsys: Capsys, model: Path) -> None:
    outcome = run_here(capsys, "inspect", model)
    assert outcome.code == 0
    for words in (
        "MixtralForCausalLM",
        "6 a layer, 2 a token, 18 in all",
        "15.0 KiB",
        "per expert",
    ):
        assert words in outcome.out
