"""A folder of safetensors files as one map from tensor names to bytes on disk."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from moe_runtime.errors import CheckpointError
from moe_runtime.memory.packed_folder import is_packed, open_packed
from moe_runtime.memory.safetensors_header import FileTensor, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint(Mapping[str, FileTensor]):
    """Tensor name -> FileTensor over all shards of a folder; only headers are read."""

    def __init__(self, folder: Path, tensors: dict[str, FileTensor]) -> None:
        self.folder = folder
        self._tensors = tensors

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read `model.safetensors.index.json` or `model.safetensors` of `folder`.

        In a folder with packed experts the tensors are those of its source. Raises CheckpointError
        when neither exists, a shard is absent, an index entry leaves the folder or disagrees with
        its shard, a header is damaged, or a packed file is not what the folder says.
        """
        found = cls._open(folder)
        if not is_packed(folder):
            return found
        places = {name: tensor.file for name, tensor in found.items()}
        return cls(folder, open_packed(folder, places))

    @classmethod
    def _open(cls, folder: Path) -> "Checkpoint":
        index = folder / INDEX_NAME
        if index.is_file():
            return cls(folder, _read_shards(folder, _read_index(index)))
        single = folder / SINGLE_NAME
        if single.is_file():
            return cls(folder, read_header(single))
        raise CheckpointError(
            f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; moe_runtime reads safetensors "
            "checkpoints: save the model with save_pretrained(), or download it completely"
        )

    def files(self) -> list[Path]:
        """Every file that holds a tensor, in name order."""
        return sorted({tensor.file for tensor in self._tensors.values()})

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"{index} is damaged: it has no JSON object 'weight_map'; download it again"
        ) from None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} is damaged: 'weight_map' does not map names to file names")
    return weight_map


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, FileTensor]:
    headers: dict[str, dict[str, FileTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        # A checkpoint is data from strangers: its index must not make us open other files. Links
        # are followed only by name (the hub cache links each shard to a blob outside the folder).
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{folder / INDEX_NAME} names {shard!r}, which leaves the model folder; "
                "do not use this checkpoint"
            )
        if not _is_file(folder / shard):
            raise CheckpointError(
                f"{folder / INDEX_NAME} names shard {shard!r}, which does not exist; "
                "download the checkpoint completely"
            )
        headers[shard] = read_header(folder / shard)
    tensors = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{folder / INDEX_NAME} places tensor {name!r} in {shard!r}, which does not "
                "hold it; download the checkpoint again"
            )
        tensors[name] = headers[shard][name]
    return tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False
