"""The header of a safetensors file, read and checked without touching the weights."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import CheckpointError

# Format: 8 bytes little-endian header length, JSON header, tensor bytes (safetensors format page).
LENGTH_BYTES = 8
METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Where one tensor's bytes lie: contiguous, row-major, at `offset` of `file`."""

    name: str
    file: Path
    dtype: str  # safetensors code, e.g. "BF16"
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)} in {self.file.name})"


def read_header(file: Path) -> dict[str, FileTensor]:
    """Name -> place of every tensor in `file`.

    Raises CheckpointError, naming the file and the field, when the header is missing, truncated,
    absurdly long, not JSON, or describes tensors that overlap, leave gaps or leave the file.
    """
    return parse_header(file, *read_raw_header(file))


def read_raw_header(file: Path) -> tuple[bytes, int]:
    """The JSON of the header as it stands in `file`, and the bytes of the file."""
    try:
        with file.open("rb") as stream:
            file_bytes = file.stat().st_size
            prefix = stream.read(LENGTH_BYTES)
            if len(prefix) < LENGTH_BYTES:
                raise _damaged(file, f"it has {file_bytes} bytes, too few for a header")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
                raise _damaged(
                    file,
                    f"its header claims {header_bytes} bytes; the file has {file_bytes} and the "
                    f"format allows {MAX_HEADER_BYTES}",
                )
            return stream.read(header_bytes), file_bytes
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def parse_header(file: Path, raw: bytes, file_bytes: int) -> dict[str, FileTensor]:
    """What `read_header` finds, from the header `raw` of a file of `file_bytes`."""
    data_start = LENGTH_BYTES + len(raw)
    tensors = {
        name: _file_tensor(file, name, entry, data_start)
        for name, entry in header_object(file, raw).items()
        if name != METADATA
    }
    _check_coverage(file, list(tensors.values()), data_start, file_bytes)
    return tensors


def header_object(file: Path, raw: bytes) -> dict[str, Any]:
    """The header `raw` of `file` as JSON, its metadata included. Raises CheckpointError."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _damaged(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    return header


def _file_tensor(file: Path, name: str, entry: object, data_start: int) -> FileTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(file, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(file, f"tensor {name!r} has unknown dtype {dtype!r}")
    if not _are_counts(shape):
        raise _damaged(file, f"tensor {name!r} has shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"tensor {name!r} has data_offsets {offsets!r}")
    num_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BITS[dtype] != num_bytes * 8:
        raise _damaged(
            file, f"tensor {name!r} ({dtype} {shape}) does not fill its {num_bytes} bytes"
        )
    return FileTensor(name, file, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_coverage(
    file: Path, tensors: list[FileTensor], data_start: int, file_bytes: int
) -> None:
    end, previous = data_start, "the header"
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset < end:
            raise _damaged(file, f"tensors {previous!r} and {tensor.name!r} overlap")
        if tensor.offset > end:
            raise _damaged(file, f"there is a gap of {tensor.offset - end} bytes before {tensor}")
        end, previous = tensor.offset + tensor.num_bytes, tensor.name
    if end > file_bytes:
        raise _damaged(
            file, f"it has {file_bytes} bytes and {previous!r} ends at {end}: it is truncated"
        )
    if end < file_bytes:
        raise _damaged(file, f"{file_bytes - end} bytes follow its last tensor")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {what}; download the file again")
