"""A budget is a budget: peak memory and bytes read of a model of 1.4 GB, in its own process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

NUM_LAYERS = 8
NUM_EXPERTS = 32
HIDDEN = 512
FFN = 1792
EXPERT_BYTES = 3 * HIDDEN * FFN * 2
MIB = 2**20
SLACK_BYTES = 2 * EXPERT_BYTES + 100 * MIB
# Direct reads start and end on blocks; one expert is read in one run here.
ALIGNMENT_SHARE = 0.01

MEASURE = """
import json, sys, warnings
import torch
import transformers.models.mixtral.modeling_mixtral
import moe_runtime.integrations.transformers.load
from moe_runtime.measure.process_memory import peak_resident_bytes, resident_bytes

def bytes_from_disk():
    lines = open("/proc/self/io").read().split()
    return int(lines[lines.index("read_bytes:") + 1])

warnings.simplefilter("ignore")
torch.set_num_threads(1)
after_imports = resident_bytes()
model = moe_runtime.load(sys.argv[1], expert_memory=sys.argv[2])
load_peak = peak_resident_bytes()
read_before = bytes_from_disk()
tokens = torch.randint(0, 2000, (1, 48), generator=torch.Generator().manual_seed(0))
model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
report = moe_runtime.handle(model).report()
report["read_from_disk"] = bytes_from_disk() - read_before
report["after_imports"] = after_imports
report["load_peak"] = load_peak
report["peak"] = peak_resident_bytes()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 256 experts in hub layout, a shard a layer; all experts hold the same noise."""
    folder = tmp_path_factory.mktemp("large-mixtral")
    config = MixtralConfig(
        vocab_size=2000,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    expert = {"w1": noise(FFN, HIDDEN), "w2": noise(HIDDEN, FFN), "w3": noise(FFN, HIDDEN)}
    weight_map: dict[str, str] = {}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        tensors = {
            f"{prefix}block_sparse_moe.experts.{e}.{name}.weight": value.clone()
            for e in range(NUM_EXPERTS)
            for name, value in expert.items()
        }
        tensors[f"{prefix}block_sparse_moe.gate.weight"] = noise(NUM_EXPERTS, HIDDEN)
        for name, rows in (("q_proj", 512), ("k_proj", 256), ("v_proj", 256), ("o_proj", 512)):
            tensors[f"{prefix}self_attn.{name}.weight"] = noise(rows, HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        if layer == 0:
            tensors["model.embed_tokens.weight"] = noise(2000, HIDDEN)
            tensors["lm_head.weight"] = noise(2000, HIDDEN)
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        shard = f"model-{layer + 1:05d}-of-{NUM_LAYERS:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("expert_memory", ["128MiB", "35%"])
def test_memory_and_reads_stay_within_the_budget(model_folder: Path, expert_memory: str) -> None:
    """Peak over imports <= dense + budget + two experts + 100 MiB; reads are misses x bytes."""
    command = [sys.executable, "-c", MEASURE, str(model_folder), expert_memory]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    report = json.loads(done.stdout)
    memory, cache = report["memory"], report["cache"]
    assert cache["slots"] * cache["slot_bytes"] <= memory["expert_budget_bytes"]
    dense_bytes = memory["dense_bytes"] - memory["mapped_bytes"]
    allowed = dense_bytes + memory["expert_budget_bytes"] + SLACK_BYTES
    assert report["load_peak"] - report["after_imports"] <= allowed
    assert report["peak"] - report["after_imports"] <= allowed
    missed = cache["misses"] * EXPERT_BYTES
    assert missed <= cache["bytes_read"] <= missed * (1 + ALIGNMENT_SHARE)
    if report["settings"]["direct_reads"]:
        assert missed <= report["read_from_disk"] <= missed * (1 + ALIGNMENT_SHARE) + MIB
