"""Quantised checkpoints as transformers' plain model sees them: each weight where it belongs."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from moe_runtime.errors import CheckpointError, UnsupportedModelError
from moe_runtime.kernels.scaled_blocks import FP8_BLOCK
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.safetensors_header import FileTensor
from moe_runtime.memory.scaled_tensor import ScaledTensor

# What `quant_method` of a config calls them, and the formats of `kernels/scaled_blocks.py`.
Quantisation = Literal["fp8", "mxfp4"]

_FP8_SETTINGS = {
    "fmt": "e4m3",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    "activation_scheme": "dynamic",
}
_FP8_SCALE = "_scale_inv"
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"


def quantisation_of(config: PreTrainedConfig, model: str) -> Quantisation | None:
    """How the weights of `model` are quantised, None if they are not.

    Raises UnsupportedModelError, naming the method or the setting, for any that cannot be read.
    """
    settings = _settings(config)
    if settings is None:
        return None
    method = settings.get("quant_method")
    for known in get_args(Quantisation):
        if method == known:
            if known == "fp8":
                _check_fp8(settings, model)
            return known  # type: ignore[no-any-return]  # get_args() has no types
    raise UnsupportedModelError(
        f"{model} is quantised ({method or 'unknown method'}), which is not supported; fp8 as "
        "DeepSeek-V3 has it and mxfp4 as gpt-oss has it are: use such a checkpoint, or one in "
        "bfloat16, float16 or float32"
    )


def plain_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """`config` with its attributes `changes`, and of the model that is not quantised."""
    config = deepcopy(config)
    for part in (config.get_text_config(), config):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def weights_of(checkpoint: Checkpoint, quantisation: Quantisation | None) -> Checkpoint:
    """The tensors of `checkpoint`, with a ScaledTensor for each two that are values and scales.

    Raises CheckpointError, naming tensor and file, where one of the two is missing or misshapen.
    """
    if quantisation is None:
        return checkpoint
    pair = _fp8_weight if quantisation == "fp8" else _mxfp4_weight
    tensors = {}
    for tensor in checkpoint.values():
        weight = pair(tensor, checkpoint)
        if weight is not None:
            tensors[weight.name] = weight
    return Checkpoint(checkpoint.folder, tensors)


def _settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    for owner in (config, config.get_text_config()):
        settings = getattr(owner, "quantization_config", None)
        if settings is not None:
            return settings if isinstance(settings, dict) else dict(settings.to_dict())
    return None


def _check_fp8(settings: Mapping[str, Any], model: str) -> None:
    for name, supported in _FP8_SETTINGS.items():
        value = settings.get(name, supported)
        if (list(value) if isinstance(value, tuple) else value) != supported:
            raise UnsupportedModelError(
                f"the config of {model} has quantization_config.{name} = {value!r}, and fp8 is "
                f"supported with {supported!r}; use a checkpoint with that, or one in bfloat16"
            )


def _fp8_weight(tensor: FileTensor, checkpoint: Checkpoint) -> FileTensor | None:
    """The weight that `tensor` is or holds the values of; None for scales."""
    if tensor.name.endswith(_FP8_SCALE):
        name = tensor.name.removesuffix(_FP8_SCALE)
        if name not in checkpoint:
            raise _alone(tensor, name)
        return None
    scales = checkpoint.get(tensor.name + _FP8_SCALE)
    if scales is not None:
        return ScaledTensor.fp8(tensor, scales)
    if tensor.dtype == "F8_E4M3":
        raise _alone(tensor, tensor.name + _FP8_SCALE)
    return tensor


def _mxfp4_weight(tensor: FileTensor, checkpoint: Checkpoint) -> FileTensor | None:
    for suffix, other in (_MXFP4_BLOCKS, _MXFP4_SCALES), (_MXFP4_SCALES, _MXFP4_BLOCKS):
        if tensor.name.endswith(suffix):
            name = tensor.name.removesuffix(suffix)
            if name + other not in checkpoint:
                raise _alone(tensor, name + other)
            if suffix == _MXFP4_SCALES:
                return None
            return ScaledTensor.mxfp4(name, tensor, checkpoint[name + other])
    return tensor


def _alone(tensor: FileTensor, missing: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor} needs {missing}, which no file of its folder holds; download the checkpoint "
        "completely"
    )
