"""A tiny random Mixtral with a byte tokenizer, saved as on the hub: for tests that damage files."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

NUM_LAYERS = 3
NUM_EXPERTS = 6
TOP_K = 2
CONTEXT_TOKENS = 96
END = "<|end|>"


def save_tokenizer(folder: Path) -> None:
    """One token a byte, and an end of text that no prompt contains."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {letter: i for i, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END
    ).save_pretrained(folder)


def save_mixtral(folder: Path, *, max_shard_size: str = "1GB", **changes: Any) -> Path:
    """A checkpoint in hub layout with its tokenizer; returns `folder`."""
    settings: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": CONTEXT_TOKENS,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**settings | changes))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # far enough apart that greedy tokens do not hang on a last bit
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    save_tokenizer(folder)
    return folder


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    """The file again, with another header."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_config(folder: Path, **changes: Any) -> None:
    """Overwrite entries of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
