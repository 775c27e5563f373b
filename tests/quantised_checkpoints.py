"""Tiny quantised checkpoints in the layouts in which DeepSeek-V3 and gpt-oss are published."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from moe_runtime.kernels.reference import quantize_fp8_reference, quantize_mxfp4_reference
from tests.tiny_checkpoint import save_tokenizer
from tests.tiny_models import family_classes, randomise, tiny_config

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
# Sides of which 128 is a part, so that transformers reads them too: it derives the squares from the
# shape of the scales.
WHOLE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
# A last square of fewer rows and columns, as DeepSeek-V3 has in its kv_a_proj.
CUT = {"hidden_size": 144, "intermediate_size": 160, "moe_intermediate_size": 136}


def save_fp8(folder: Path, sizes: dict[str, Any] = WHOLE, *, family: str = "deepseek_v3") -> Path:
    """A bf16 model whose linear layers, experts' and others, are fp8; the router's are not."""
    tensors = _saved(folder, family, sizes)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        values, scales = quantize_fp8_reference(tensors[name])
        tensors[name], tensors[f"{name}_scale_inv"] = values, scales
    return _finish(folder, tensors, FP8)


def save_mxfp4(folder: Path) -> Path:
    """A bf16 gpt-oss whose experts are mxfp4, gate and up in turns, and nothing else."""
    tensors = _saved(folder, "gpt_oss", {"hidden_size": 96, "intermediate_size": 64})
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        stored = [quantize_mxfp4_reference(one.mT.contiguous()) for one in tensors.pop(name)]
        tensors[f"{name}_blocks"] = torch.stack([blocks for blocks, _ in stored])
        tensors[f"{name}_scales"] = torch.stack([scales for _, scales in stored])
    return _finish(folder, tensors, MXFP4)


def load_dequantised(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model as transformers dequantises it, with eager experts.

    What is not quantised keeps its dtype in transformers 5.23, which in float32 gives a model that
    does not run: it is made float32 here.
    """
    config = AutoConfig.from_pretrained(folder)
    is_fp8 = config.quantization_config["quant_method"] == "fp8"
    settings: Any = FineGrainedFP8Config if is_fp8 else Mxfp4Config
    model_class = getattr(transformers, config.architectures[0])
    model: PreTrainedModel = model_class.from_pretrained(
        folder,
        dtype=dtype,
        experts_implementation="eager",
        quantization_config=settings(dequantize=True),
    )
    return model.float() if dtype == torch.float32 else model


def save_dequantised(source: Path, folder: Path) -> Path:
    """An fp8 checkpoint dequantised square by square: what it means, rounded once to float32."""
    tensors = tensors_of(source)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        scales, dense = tensors.pop(name), tensors[weight].double()
        for (n, k), scale in np.ndenumerate(scales.numpy()):
            dense[128 * n : 128 * (n + 1), 128 * k : 128 * (k + 1)] *= float(scale)
        tensors[weight] = dense.float()
    shutil.copytree(source, folder)
    resave(folder, tensors)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def resave(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put `tensors` in the place of all weights of `folder`."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _saved(folder: Path, family: str, sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A random bf16 model of the family with its tokenizer; its weights, to be quantised."""
    config = tiny_config(family)
    config.vocab_size, config.eos_token_id, config.bos_token_id = 257, 0, None
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.dtype = torch.bfloat16
    model_class = getattr(transformers, family_classes()[family])
    model = model_class._from_config(config, dtype=torch.float32)
    randomise(model, seed=1)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return tensors_of(folder)


def _finish(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    resave(folder, tensors)
    change_config(folder, quantization_config=settings)
    return folder
