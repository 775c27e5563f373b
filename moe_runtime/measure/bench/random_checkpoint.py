"""Writes a checkpoint with the shapes of a preset and random weights, in the hub's layout."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moe_runtime.measure.bench.presets import Preset
from moe_runtime.memory.disk_space import check_disk_space

_RECIPE = "recipe.json"
_RECIPE_VERSION = 2
# A shard lies in memory twice while it is written, so this bounds the memory that a writer needs.
_SHARD_BYTES = 2**29
_EMBEDDING_SIGMA = 1.0

Progress = Callable[[int, int], None]  # bytes written, bytes in all


def write_random_checkpoint(
    preset: Preset,
    folder: Path,
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> Path:
    """Write a checkpoint that `from_pretrained` reads; returns `folder`.

    `num_layers`, `num_experts` and `top_k` replace the preset's own counts.

    Matrices are normal noise with the config's `initializer_range`, routers included, as the family
    initialises them. Token embeddings have unit variance, as large as what they are added to: with
    the initial range attention's mean over the context outweighs the token, and routers then choose
    almost the same experts for every one (OLMoE: 93 % hits with a quarter of the experts in
    memory). Norms are one, biases zero. A tensor's noise depends on the seed and its name alone:
    equal arguments give equal bytes, and the first layers of a deeper model are those of a
    shallower one.

    A folder that holds what is asked for is left as it is. Any other checkpoint written here is
    replaced; files of anybody else are not: ValueError. Needs memory for two shards of 512 MiB.
    """
    preset = preset.changed(num_layers=num_layers, num_experts=num_experts, top_k=top_k)
    model = _meta_model(preset, dtype)
    tensors = _hub_tensors(model)
    recipe = {
        "version": _RECIPE_VERSION,
        "preset": preset.name,
        "model_type": preset.model_type,
        "fields": dict(preset.fields),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
    }
    if _is_finished(folder, recipe):
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    _make_room(folder, partial, sum(tensor.nbytes for tensor in tensors.values()))
    try:
        _write(model, tensors, partial, seed, recipe, on_progress)
        partial.rename(folder)
    except BaseException:  # Ctrl-C included: gigabytes that nobody can use
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _meta_model(preset: Preset, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(preset.config(), dtype=dtype)
    model.config.architectures = [type(model).__name__]
    return model


def _hub_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name -> tensor without data of every tensor in a checkpoint of `model`, layer by layer."""
    tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    return tensors


def _is_finished(folder: Path, recipe: Mapping[str, Any]) -> bool:
    try:
        found = json.loads((folder / _RECIPE).read_text())
        files = found.pop("files")
        return found == recipe and all(
            (folder / name).stat().st_size == num_bytes for name, num_bytes in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _make_room(folder: Path, partial: Path, needed_bytes: int) -> None:
    """Remove what an earlier run left, check the disk, and make the folder to write in."""
    if folder.exists():
        if not (folder / _RECIPE).is_file() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds files that are no random checkpoint of ours; "
                "name a folder that is empty or does not exist"
            )
        shutil.rmtree(folder)
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(partial, needed_bytes)
    partial.mkdir()


def _write(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    seed: int,
    recipe: Mapping[str, Any],
    on_progress: Progress,
) -> None:
    sigma = float(model.config.initializer_range)
    shards = list(_shards(tensors))
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    done_bytes = 0
    weight_map: dict[str, str] = {}

    def draw(name: str) -> torch.Tensor:
        return _draw(name, tensors[name], sigma, seed)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shard = dict(zip(names, threads.map(draw, names), strict=True))
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
            done_bytes += sum(tensor.nbytes for tensor in shard.values())
            on_progress(done_bytes, total_bytes)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    model.config.save_pretrained(folder)
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / _RECIPE).write_text(json.dumps({**recipe, "files": files}, indent=2) + "\n")


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names in order, cut where a file would exceed the size of a shard."""
    names: list[str] = []
    num_bytes = 0
    for name, tensor in tensors.items():
        if names and num_bytes + tensor.nbytes > _SHARD_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += tensor.nbytes
    yield names


def _draw(name: str, like: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    tensor = torch.empty(like.shape, dtype=like.dtype)
    if name.endswith("bias"):
        return tensor.zero_()
    if tensor.ndim == 1:
        return tensor.fill_(1)
    if name.endswith("embed_tokens.weight"):
        sigma = _EMBEDDING_SIGMA
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return tensor.normal_(0, sigma, generator=generator)
