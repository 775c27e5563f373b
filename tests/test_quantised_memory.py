"""Quantised experts take their own bytes and no more: peak memory of a model in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig

from tests.quantised_checkpoints import MXFP4, resave
from tests.test_budget_is_kept import MEASURE

NUM_LAYERS, NUM_EXPERTS, SIDE, VOCABULARY = 8, 32, 512, 2000
GROUPS = SIDE // 32
MIB = 2**20
BF16_BYTES = NUM_LAYERS * NUM_EXPERTS * 3 * SIDE * SIDE * 2
SLACK_BYTES = 100 * MIB


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss of 256 experts: 107 MiB of mxfp4, 384 MiB when dequantised."""
    folder = tmp_path_factory.mktemp("large-gpt-oss")
    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=SIDE, intermediate_size=SIDE, head_dim=64,
        num_hidden_layers=NUM_LAYERS, num_attention_heads=8, num_key_value_heads=4,
        num_local_experts=NUM_EXPERTS, num_experts_per_tok=4, pad_token_id=0, eos_token_id=1,
        architectures=["GptOssForCausalLM"], dtype="bfloat16", quantization_config=MXFP4,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    def stored(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = torch.randint(0, 256, (NUM_EXPERTS, rows, GROUPS, 16), generator=generator)
        scales = torch.randint(117, 121, (NUM_EXPERTS, rows, GROUPS), generator=generator)
        return blocks.to(torch.uint8), scales.to(torch.uint8)

    tensors = {
        "model.embed_tokens.weight": noise(VOCABULARY, SIDE),
        "lm_head.weight": noise(VOCABULARY, SIDE),
        "model.norm.weight": noise(SIDE) + 1,
    }
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", 512, SIDE), ("self_attn.k_proj", 256, SIDE),
            ("self_attn.v_proj", 256, SIDE), ("self_attn.o_proj", SIDE, 512),
            ("mlp.router", NUM_EXPERTS, SIDE),
        ):  # fmt: skip
            tensors[f"{prefix}{name}.weight"] = noise(rows, columns)
            tensors[f"{prefix}{name}.bias"] = noise(rows)
        tensors[f"{prefix}self_attn.sinks"] = noise(8)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = noise(SIDE) + 1
        for name, rows in (("gate_up_proj", 2 * SIDE), ("down_proj", SIDE)):
            blocks, scales = stored(rows)
            tensors[f"{prefix}mlp.experts.{name}_blocks"] = blocks
            tensors[f"{prefix}mlp.experts.{name}_scales"] = scales
            tensors[f"{prefix}mlp.experts.{name}_bias"] = noise(NUM_EXPERTS, rows)
    resave(folder, tensors)
    return folder


@pytest.mark.parametrize("expert_memory", ["35%", "100%"])
def test_no_second_copy_of_the_experts(model_folder: Path, expert_memory: str) -> None:
    """Peak over imports <= dense + budget + 100 MiB, which bf16 experts alone would exceed."""
    command = [sys.executable, "-c", MEASURE, str(model_folder), expert_memory]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    report = json.loads(done.stdout)
    memory, cache = report["memory"], report["cache"]
    assert report["settings"]["quantisation"] == "mxfp4"
    assert memory["expert_used_bytes"] <= memory["expert_budget_bytes"]
    assert memory["expert_total_bytes"] < 0.29 * BF16_BYTES
    allowed = memory["dense_bytes"] + memory["expert_budget_bytes"] + SLACK_BYTES
    assert allowed < BF16_BYTES
    assert report["peak"] - report["after_imports"] <= allowed
    stored_bytes = memory["expert_total_bytes"] / (NUM_LAYERS * NUM_EXPERTS)
    assert cache["bytes_read"] <= cache["misses"] * stored_bytes * 1.05
