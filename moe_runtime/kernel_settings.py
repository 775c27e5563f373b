"""Tile settings of the grouped product by GPU name and shape, read from `configs/kernels/`."""

import functools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moe_runtime.config import Plausible, load_config
from moe_runtime.errors import ConfigError
from moe_runtime.kernels.tile_settings import TileSettings

_FOLDER = Path(__file__).resolve().parent / "configs" / "kernels"
_UNTUNED = "untuned"
_REMEDY = "mend the file"

Count = Annotated[int, Plausible(1, 10**9)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """How one layer's two products are cut.

    Meant for up to `max_rows_per_expert` rows per expert that occurs, of `value_bytes` a number.
    With `model_dim` and `ffn_dim` it is meant for that shape alone.
    """

    max_rows_per_expert: Count
    value_bytes: Annotated[int, Plausible(2, 4, "bytes")]
    model_dim: Count | None = None
    ffn_dim: Count | None = None
    block_rows: Annotated[int, Plausible(1, 256)]
    gate_up: TileSettings
    down: TileSettings

    def __post_init__(self) -> None:
        if (self.model_dim is None) != (self.ffn_dim is None):
            raise ValueError("model_dim and ffn_dim are given together or not at all")
        if self.block_rows & (self.block_rows - 1):
            raise ValueError(f"block_rows ({self.block_rows}) must be a power of two")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    """All settings for one GPU, or for any."""

    gpu: str
    source: Literal["measured", "untuned"]
    entries: tuple[LayerSettings, ...]

    @classmethod
    def untuned(cls) -> "KernelSettings":
        """What fits every supported GPU."""
        return _load(_FOLDER / f"{_UNTUNED}.yaml")

    def find(
        self, *, num_pairs: int, num_experts: int, model_dim: int, ffn_dim: int, value_bytes: int
    ) -> LayerSettings | None:
        """The entry for this layer, for its own shape if there is one; None if there is none.

        Assumes balanced routing: `num_pairs` rows over as many experts as can occur.
        """
        rows = -(-num_pairs // max(1, min(num_experts, num_pairs)))
        for shape in ((model_dim, ffn_dim), (None, None)):
            fitting = [
                entry
                for entry in self.entries
                if entry.value_bytes == value_bytes
                and (entry.model_dim, entry.ffn_dim) == shape
                and entry.max_rows_per_expert >= rows
            ]
            if fitting:
                return min(fitting, key=lambda entry: entry.max_rows_per_expert)
        return None


def layer_settings(
    gpu_name: str,
    *,
    num_pairs: int,
    num_experts: int,
    model_dim: int,
    ffn_dim: int,
    value_bytes: int,
    folder: Path = _FOLDER,
) -> LayerSettings:
    """Settings for one layer on the GPU that torch calls `gpu_name`.

    What its file does not hold comes from the untuned ones; a warning says so once a GPU.
    """
    for settings in (_of_gpu(gpu_name, folder), KernelSettings.untuned()):
        found = settings and settings.find(
            num_pairs=num_pairs,
            num_experts=num_experts,
            model_dim=model_dim,
            ffn_dim=ffn_dim,
            value_bytes=value_bytes,
        )
        if found:
            return found
        _say_untuned(gpu_name)
    raise ConfigError(
        f"no kernel settings for {num_pairs} pairs of {value_bytes}-byte values; the kernels take "
        "2 and 4 bytes"
    )


def file_name(gpu_name: str) -> str:
    """The file for a GPU: "NVIDIA H100 80GB HBM3" has nvidia-h100-80gb-hbm3.yaml."""
    return re.sub("[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".yaml"


@functools.cache
def _load(path: Path) -> KernelSettings:
    return load_config(KernelSettings, path, remedy=_REMEDY)


@functools.cache
def _of_gpu(gpu_name: str, folder: Path) -> KernelSettings | None:
    path = folder / file_name(gpu_name)
    if not path.exists():
        return None
    settings = _load(path)
    if settings.gpu != gpu_name:
        raise ConfigError(f"{path} is for {settings.gpu}, not for {gpu_name}; rename the file")
    return settings


@functools.cache  # once a GPU
def _say_untuned(gpu_name: str) -> None:
    warnings.warn(
        f"no tuned kernel settings for {gpu_name} and this shape: untuned ones are used "
        f"(configs/kernels/{file_name(gpu_name)} would hold them)",
        stacklevel=3,
    )
