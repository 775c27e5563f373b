"""Writes the weights of a checkpoint as GGUF, for llama.cpp."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedConfig

from moe_runtime.errors import CheckpointError, MissingPackageError, UnsupportedModelError
from moe_runtime.integrations.gguf_families import Family, describe, family_of
from moe_runtime.integrations.transformers.resolve import resolve_model
from moe_runtime.memory.checkpoint import Checkpoint
from moe_runtime.memory.disk_space import check_disk_space
from moe_runtime.memory.read_tensor import read_tensor

Progress = Callable[[int, int], None]  # bytes written, bytes in all

_SOURCE_KEY = "moe_runtime.source"
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One tensor of the file, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_gguf(
    checkpoint_folder: Path,
    gguf_path: Path,
    *,
    dtype: str = "bf16",
    on_progress: Progress = lambda done, total: None,
) -> Path:
    """Write the weights of `checkpoint_folder` to `gguf_path`; returns `gguf_path`.

    Matrices are stored as `dtype`, `bf16` or `f16`; norms and routers as float32, as llama.cpp's
    own converter does. bf16 keeps the bits of a bfloat16 checkpoint and is what llama.cpp computes
    fastest with where the processor multiplies bfloat16. f16 rounds weights below 2^-17 by at most
    2^-25, and activations three bits finer. The file has a vocabulary of numbers only: it takes
    token ids, not text.

    Needs memory for one matrix of all experts of a layer. A file made before from the same files
    is left as it is. Raises UnsupportedModelError for what llama.cpp would compute differently.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"GGUF dtype {dtype!r} is not known; give {' or '.join(_DTYPES)}")
    resolved = resolve_model(checkpoint_folder, local_files_only=True)
    if resolved.quantisation is not None:
        raise UnsupportedModelError(
            f"{checkpoint_folder} is quantised ({resolved.quantisation}), and GGUF is written from "
            "bfloat16, float16 or float32 checkpoints; use one of these"
        )
    config, checkpoint = resolved.config, Checkpoint.open(resolved.folder)
    family = family_of(config)
    gguf = _import_gguf()
    source = _fingerprint(checkpoint, dtype)
    if _source_of(gguf, gguf_path) == source:
        return gguf_path
    parts = list(_parts(gguf, family, config, checkpoint, _DTYPES[dtype]))
    total_bytes = sum(part.num_bytes for part in parts)
    gguf_path.parent.mkdir(parents=True, exist_ok=True)
    gguf_path.unlink(missing_ok=True)
    check_disk_space(gguf_path, total_bytes)
    partial = gguf_path.with_name(f"{gguf_path.name}.partial")
    writer = gguf.GGUFWriter(partial, family.architecture)
    try:
        describe(gguf, writer, family, config)
        writer.add_string(_SOURCE_KEY, source)
        writer.add_file_type(
            gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bf16" else gguf.LlamaFileType.MOSTLY_F16
        )
        _write(gguf, writer, parts, total_bytes, on_progress)
        writer.close()
        partial.rename(gguf_path)
    except BaseException:  # Ctrl-C included: gigabytes that nobody can use
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    return gguf_path


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingPackageError(
            "writing GGUF needs the package gguf; install it with: pip install gguf"
        ) from None
    return gguf


def _fingerprint(checkpoint: Checkpoint, dtype: str) -> str:
    """Changes whenever a file of the checkpoint is written again."""
    files = [checkpoint.folder / "config.json", *checkpoint.files()]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([dtype, stats]).encode()).hexdigest()


def _source_of(gguf: Any, path: Path) -> str | None:
    """The fingerprint in a file written here, else None."""
    try:
        field = gguf.GGUFReader(path).get_field(_SOURCE_KEY)
    except (OSError, ValueError, KeyError, IndexError):  # no such file, or half of one
        return None
    return None if field is None else str(field.contents())


def _parts(
    gguf: Any, family: Family, config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype
) -> Iterator[_Part]:
    """Every tensor of the file; experts of a layer that do the same become one `[E, ...]`."""
    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture
    )
    places = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def part(name: str, shape: Sequence[int], read: Callable[[], torch.Tensor]) -> _Part:
        found = places.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModelError(
                f"tensor {name} has no place in GGUF's {family.architecture} models; "
                "leave llama.cpp out"
            )
        is_exact = len(shape) == 1 or found.endswith("ffn_gate_inp.weight")
        return _Part(
            name=found,
            shape=tuple(shape),
            dtype=torch.float32 if is_exact else dtype,
            read=read,
        )

    for name, sources in _grouped(checkpoint, config.num_experts).items():
        shape = checkpoint[sources[0]].shape
        if name not in checkpoint:
            yield part(name, (len(sources), *shape), _stacked(checkpoint, sources, dtype))
        elif family.has_latent_attention and name.endswith(".kv_b_proj.weight"):
            # Kept apart and one of them transposed, each can be absorbed into its neighbour.
            heads, num_keys = config.num_attention_heads, config.qk_nope_head_dim
            halves = {
                "k_b_proj": (heads, shape[1], num_keys),
                "v_b_proj": (heads, config.v_head_dim, shape[1]),
            }
            for key, half in halves.items():
                read = _latent_half(checkpoint, name, heads, num_keys, is_key=key == "k_b_proj")
                yield part(name.replace("kv_b_proj", key), half, read)
        elif family.rotates_pairs and name.endswith((".q_proj.weight", ".k_proj.weight")):
            is_query = name.endswith(".q_proj.weight")
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            yield part(name, shape, _in_pairs(checkpoint, name, heads))
        else:
            yield part(name, shape, _as_it_is(checkpoint, name))


def _grouped(checkpoint: Checkpoint, num_experts: int) -> dict[str, list[str]]:
    """Name -> tensors that belong under it: itself, or one matrix of all experts of a layer."""
    groups: dict[str, list[str]] = {}
    experts: dict[str, dict[int, str]] = {}
    for name in checkpoint:
        match = _EXPERT.fullmatch(name)
        if match is None:
            groups[name] = [name]
            continue
        group = f"{match['experts']}.{match['rest']}"
        groups[group] = []
        experts.setdefault(group, {})[int(match["number"])] = name
    for group, members in experts.items():
        if sorted(members) != list(range(num_experts)):
            raise CheckpointError(
                f"{checkpoint.folder} holds {len(members)} experts of {group} and its config "
                f"says {num_experts}; download it completely"
            )
        groups[group] = [members[number] for number in range(num_experts)]
    return groups


def _as_it_is(checkpoint: Checkpoint, name: str) -> Callable[[], torch.Tensor]:
    return lambda: read_tensor(checkpoint[name])


def _stacked(
    checkpoint: Checkpoint, names: Sequence[str], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        whole = torch.empty((len(names), *checkpoint[names[0]].shape), dtype=dtype)
        for row, name in zip(whole, names, strict=True):
            row.copy_(read_tensor(checkpoint[name]))
        return whole

    return read


def _in_pairs(checkpoint: Checkpoint, name: str, num_heads: int) -> Callable[[], torch.Tensor]:
    """Each head's rows i and i + half, which transformers rotates together, side by side."""

    def read() -> torch.Tensor:
        weight = read_tensor(checkpoint[name])
        halves = weight.view(num_heads, 2, -1, weight.shape[1])
        return halves.transpose(1, 2).reshape(weight.shape)

    return read


def _latent_half(
    checkpoint: Checkpoint, name: str, num_heads: int, num_keys: int, *, is_key: bool
) -> Callable[[], torch.Tensor]:
    """From latent to keys `[heads, latent, key]`, or to values `[heads, value, latent]`."""

    def read() -> torch.Tensor:
        weight = read_tensor(checkpoint[name])
        per_head = weight.view(num_heads, -1, weight.shape[1])
        if is_key:
            return per_head[:, :num_keys].transpose(1, 2)
        return per_head[:, num_keys:]

    return read


def _write(
    gguf: Any, writer: Any, parts: Sequence[_Part], total_bytes: int, on_progress: Progress
) -> None:
    """Header, then one tensor after the other: no more than one is in memory."""
    types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    for part in parts:
        writer.add_tensor_info(
            part.name, part.shape, np.dtype(np.int16), part.num_bytes, types[part.dtype]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done_bytes = 0
    for part in parts:
        writer.write_tensor_data(_raw(part))
        done_bytes += part.num_bytes
        on_progress(done_bytes, total_bytes)


def _raw(part: _Part) -> npt.NDArray[np.int16]:
    """The tensor's bytes; NumPy knows no bfloat16."""
    tensor = part.read().to(part.dtype).contiguous()
    if not all(end.isfinite() for end in tensor.aminmax()):
        raise ValueError(f"{part.name} holds weights beyond {part.dtype}; write GGUF as bf16")
    return tensor.view(-1).view(torch.int16).numpy()
