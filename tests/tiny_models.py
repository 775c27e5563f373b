"""Tiny random models of every causal-LM family whose experts transformers can dispatch."""

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODELS_FOLDER = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)
CAUSAL_LM = re.compile(r"^class (\w+ForCausalLM)\(", re.MULTILINE)

NUM_EXPERTS = 8
TOP_K = 2
NUM_LAYERS = 4
NUM_DECODED = 3

# Attribute name -> size, whatever the family calls it. Hidden, ffn and expert-ffn widths differ,
# doubled or not, so that a transposed or swapped weight never fits by accident.
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "vocab_size_per_layer_input": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 40,
    "dense_intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_intermediate_size": 20,
    "shared_expert_intermediate_size": 20,
    "shared_experts_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 20,
    # One dense layer where the family has dense layers
    "num_hidden_layers": NUM_LAYERS,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_end_index": NUM_LAYERS - 1,
    # Routing
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_k": TOP_K,
    "moe_topk": TOP_K,
    "top_k_experts": TOP_K,
    "router_hidden_size": 16,
    # Low enough to clip, so that an activation without its clamp is noticed
    "swiglu_limit": 0.5,
    "mlp_gate_softcap": 0.5,
    "mlp_up_softcap": 0.5,
    # Attention: windows and indexes shorter than the prompt, so that they matter
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "sliding_window": 6,
    "sliding_window_size": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # Linear attention and state spaces
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
}

# A family that leaves one of these at None means "absent": it stays None.
OPTIONAL = {"pad_token_id", "bos_token_id", "eos_token_id", "q_lora_rank", "sliding_window"}

# What no rule by name can know.
OVERRIDES: dict[str, dict[str, Any]] = {
    # head_dim becomes the linear layers' head width before the config derives its own
    "bailing_hybrid": {"head_dim": 16},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    # compresses keys over spans longer than the prompt by default
    "deepseek_v4": {
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "index_topk": 2,
        "o_groups": 2,
    },
    "dots1": {"n_shared_experts": 1},  # None by default, yet the block needs a number
    # its sliding layers have sizes of their own, passed under these legacy names
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 24,
    },
    "gemma4_text": {"enable_moe_block": True, "global_head_dim": 32},  # dense by default
    # all layers are Mamba by default, which the cache refuses
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    # attention then Mamba behind the two expert layers
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 6, 4, 6]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},  # None by default
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_groups": 2,
    },
    # its sparse attention has no default sizes
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},  # refuses any other
}


@functools.cache
def family_classes() -> dict[str, str]:
    """Model type -> causal-LM class of every modelling folder with decorated experts.

    Reads source text and imports no modelling module. A folder counts once: where several model
    types share its class (`qwen3_5_moe`, `qwen3_5_moe_text`), the text sub-config stands for it,
    being the config the class is built from. A folder with decorated experts but no `*ForCausalLM`
    class (vision models, encoders) is no family. A class that AutoModelForCausalLM does not map
    (`Mistral4ForCausalLM` in 5.23) is one, under its folder's name.
    """
    mapped = {name: model_type for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    found = {}
    for path in sorted(MODELS_FOLDER.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if DECORATED.search(source) and (names := CAUSAL_LM.findall(source)):
            found[mapped.get(names[0], path.parent.name)] = names[0]
    return found


def families() -> list[str]:
    """One model type per family, sorted."""
    return sorted(family_classes())


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The family's default config, shrunk by attribute name."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    known = default.to_dict()
    absent = {name for name in OPTIONAL if known.get(name) is None}
    changes = {name: size for name, size in SIZES.items() if name in known and name not in absent}
    if known.get("num_key_value_heads") == known.get("num_attention_heads"):
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    if known.get("qk_rope_head_dim") is not None:
        changes.pop("head_dim", None)  # latent attention derives it
    if (known.get("n_group") or 1) > 1:
        changes |= {"n_group": 4, "topk_group": 2}
    if (known.get("num_expert_group") or 1) > 1:
        changes |= {"num_expert_group": 4, "topk_group": 2}
    changes |= per_layer_lists(known)
    changes |= OVERRIDES.get(model_type, {})
    config = config_class(**changes)
    config.dtype = torch.float32
    return config


def per_layer_lists(known: dict[str, Any]) -> dict[str, list[Any]]:
    """Cut every per-layer list down to `NUM_LAYERS` layers that show every kind of layer."""
    depth = known.get("num_hidden_layers")
    lists = {k: v for k, v in known.items() if isinstance(v, list) and len(v) == depth}
    rows = list(zip(*lists.values(), strict=True))
    chosen = sorted({row: i for i, row in reversed(list(enumerate(rows)))}.values())[:NUM_LAYERS]
    rest = [i for i in range(len(rows) - 1, -1, -1) if i not in chosen]
    chosen = sorted(chosen + rest[: NUM_LAYERS - len(chosen)])
    return {name: [values[i] for i in chosen] for name, values in lists.items()}


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The family's tiny model, float32, in eval mode, every weight and buffer random."""
    config = tiny_config(model_type)
    model_class = getattr(transformers, family_classes()[model_type])
    model = model_class._from_config(config, dtype=torch.float32, experts_implementation="eager")
    randomise(model, seed)
    return model.eval()


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int) -> None:
    """Redraw all weights and stored buffers, so that no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            if "bias" in name:
                tensor.copy_(0.05 * noise)
            elif tensor.ndim <= 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
        elif name.endswith("tid2eid"):
            tensor.copy_(expert_table(tensor.shape[0], tensor.shape[1], generator))
        else:
            raise NotImplementedError(f"no rule to redraw {name} ({tensor.dtype})")
        if name.endswith("balancing_biases"):
            # loading zaya always resets this one (transformers 5.23), whatever the checkpoint holds
            tensor[-1] = -1.0


def expert_table(num_rows: int, num_columns: int, generator: torch.Generator) -> torch.Tensor:
    """`[num_rows, num_columns]` random experts, no row with the same one twice."""
    return torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(-1)[:, :num_columns]


def experts_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Name -> module of every experts module that `use_experts_implementation` decorated."""
    marks = ("is_transposed", "is_concatenated", "has_gate", "_apply_gate")
    return {n: m for n, m in model.named_modules() if all(hasattr(m, mark) for mark in marks)}


def prompt(num_rows: int = 2, num_tokens: int = 12, seed: int = 0) -> torch.Tensor:
    """`[num_rows, num_tokens]` random ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, SIZES["vocab_size"], (num_rows, num_tokens), generator=generator)


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """`[rows, tokens, vocab]` logits of one forward pass."""
    logits: torch.Tensor = model(input_ids=input_ids).logits
    return logits


def greedy_ids(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """`[rows, NUM_DECODED]` ids decoded greedily with the cache, special ids included."""
    ids = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=NUM_DECODED,
        min_new_tokens=NUM_DECODED,
        do_sample=False,
    )
    return ids[:, input_ids.shape[1] :]


def load_unmodified(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The folder's model as plain transformers loads it, with eager experts."""
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForCausalLM
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        auto = getattr(transformers, config.architectures[0])
    model: PreTrainedModel = auto.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    return model


def align(model: PreTrainedModel) -> None:
    """Move every weight and buffer to memory that torch allocated.

    Loaded weights point into the mapped file, at its header's odd offset, and MKL sums in another
    order for misaligned operands: equal weights would give logits 1e-6 apart.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def can_reload(model_type: str, folder: str | Path) -> str | None:
    """None if plain transformers saves and reloads the family bit for bit, else the reason.

    A family that cannot be built or run raises: that is our mistake, not a reason to leave it out.
    """
    model = tiny_model(model_type)
    expected = logits_of(model, prompt())
    try:
        model.save_pretrained(folder)
        reloaded = load_unmodified(folder)
        align(reloaded)
        got = logits_of(reloaded, prompt())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if torch.equal(expected, got) else "logits differ"
