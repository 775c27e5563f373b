"""Writes one safetensors file with its experts packed, and gives the bytes of the source back."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels.packed_blocks import PADDING_BYTES, BlockCodec
from moe_runtime.memory.anonymous_memory import Blob
from moe_runtime.memory.packed_folder import FILE_MARK, Manifest, PackedFile, packed_tensors
from moe_runtime.memory.packing import (
    ITEM_BYTES,
    SEAL_PIECE_BYTES,
    PackedRun,
    PackedTensor,
    first_identity,
    require_intact,
    rows_per_block,
    seal,
)
from moe_runtime.memory.safetensors_header import (
    LENGTH_BYTES,
    METADATA,
    FileTensor,
    header_object,
    parse_header,
    read_raw_header,
)

# A tensor that packing does not make this much smaller stays as it is: it costs time to unpack.
MAX_PACKED_SHARE = 0.95

Rows = Sequence[int]  # of one tensor: how many rows each run has
OnBytes = Callable[[int], None]  # so many bytes of the source are done, since the last call


def pack_file(
    source: Path,
    target: Path,
    rows: Mapping[str, Rows],
    fingerprint: str,
    codec: BlockCodec,
    on_bytes: OnBytes,
) -> PackedFile:
    """Write `target` with the tensors of `source`, those in `rows` packed where that pays.

    Names, order and the address of every tensor modulo a cache line stay. Holds one run of one
    tensor in memory, twice. The file is on disk when this returns.
    """
    raw, source_bytes = read_raw_header(source)
    tensors = sorted(parse_header(source, raw, source_bytes).values(), key=lambda t: t.offset)
    room = _header_room(raw)
    sha256 = hashlib.sha256(_prefixed(raw))
    runs: dict[str, tuple[PackedRun, ...]] = {}
    checksums: dict[str, int] = {}
    offsets: dict[str, tuple[int, int]] = {}
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.seek(LENGTH_BYTES + room)
        start = writer.tell()
        for tensor in tensors:
            first = writer.tell()
            pieces = _Pieces(reader, tensor, sha256, on_bytes)
            if tensor.name in rows:
                runs_made = _write_packed(writer, pieces, rows[tensor.name], fingerprint, codec)
                if runs_made is not None:
                    runs[tensor.name] = runs_made
                else:
                    writer.seek(first)
            if tensor.name not in runs:
                checksums[tensor.name] = _write_as_it_is(writer, pieces, codec)
            offsets[tensor.name] = (first - start, writer.tell() - start)
        writer.truncate()
        header = _header(source, raw, offsets, runs, fingerprint)
        assert len(header) <= room, (len(header), room)
        writer.seek(0)
        writer.write(_prefixed(header.ljust(room)))
        writer.flush()
        os.fsync(writer.fileno())
        # What is read back comes from the disk.
        os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return PackedFile(
        num_bytes=target.stat().st_size,
        source_bytes=source_bytes,
        source_sha256=sha256.hexdigest(),
        source_header=raw.decode(),
        runs=runs,
        checksums=checksums,
    )


def restored_pieces(file: Path, manifest: Manifest, codec: BlockCodec) -> Iterator[Blob]:
    """The bytes of the source of `file`, in order. Raises CheckpointError where one was altered."""
    tensors = sorted(packed_tensors(file, manifest).values(), key=_data_offset)
    yield np.frombuffer(_prefixed(manifest.files[file.name].source_header.encode()), np.uint8)
    with file.open("rb") as reader:
        for tensor in tensors:
            if not isinstance(tensor, PackedTensor):
                yield from _file_pieces(reader, tensor.offset, tensor.num_bytes)
                continue
            for block in tensor.blocks():
                (packed,) = _file_pieces(reader, block.offset, block.num_bytes, block.num_bytes)
                weights = torch.empty(block.num_elements * ITEM_BYTES, dtype=torch.uint8)
                task = block.task(torch.from_numpy(packed), weights)
                require_intact(codec.run([task]), [block], file)
                yield weights.numpy()


def restored_sha256(
    file: Path, manifest: Manifest, codec: BlockCodec, write: Callable[[Blob], object]
) -> str:
    """The SHA-256 of the restored source of `file`, whose pieces go to `write` as well."""
    sha256 = hashlib.sha256()
    for piece in restored_pieces(file, manifest, codec):
        sha256.update(piece.data)
        write(piece)
    return sha256.hexdigest()


class _Pieces:
    """Reads a tensor of the source once for its hash, and again if packing it did not pay."""

    def __init__(
        self, reader: IO[bytes], tensor: FileTensor, sha256: "hashlib._Hash", on_bytes: OnBytes
    ) -> None:
        self.tensor = tensor
        self._reader = reader
        self._sha256 = sha256
        self._on_bytes = on_bytes
        self._hashed_bytes = 0

    def read(self, first: int, num_bytes: int) -> Blob:
        (data,) = _file_pieces(self._reader, self.tensor.offset + first, num_bytes, num_bytes)
        new = first + num_bytes - self._hashed_bytes
        if new > 0:
            self._sha256.update(data[num_bytes - new :].data)
            self._hashed_bytes += new
            self._on_bytes(new)
        return data


def _write_packed(
    writer: IO[bytes], pieces: _Pieces, rows: Rows, fingerprint: str, codec: BlockCodec
) -> tuple[PackedRun, ...] | None:
    """The runs written, or None if they are not small enough to pay."""
    tensor = pieces.tensor
    num_columns = tensor.shape[-1]
    limit = int(MAX_PACKED_SHARE * tensor.num_bytes)
    identity = first_identity(fingerprint, tensor.name)
    runs: list[PackedRun] = []
    first = written = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for num_rows in rows:
            num_bytes = num_rows * num_columns * ITEM_BYTES
            weights = torch.from_numpy(pieces.read(first, num_bytes)).view(torch.int16)
            step = rows_per_block(num_rows, num_columns)
            parts = torch.split(weights.view(num_rows, num_columns), step)
            blocks = list(threads.map(codec.pack, parts))
            longest = max(block.numel() for block in blocks)
            run = PackedRun(num_rows, step, -(-longest // PADDING_BYTES) * PADDING_BYTES)
            written += run.num_bytes
            if written > limit:
                return None
            for block in blocks:
                padded = torch.zeros(run.block_bytes, dtype=torch.uint8)
                padded[: block.numel()] = block
                codec.seal(padded, identity)
                writer.write(padded.numpy().data)
                identity = (identity + 1) % 2**64
            runs.append(run)
            first += num_bytes
    # The next tensor keeps its address modulo a cache line.
    writer.write(bytes((tensor.num_bytes - written) % PADDING_BYTES))
    return tuple(runs)


def _write_as_it_is(writer: IO[bytes], pieces: _Pieces, codec: BlockCodec) -> int:
    """Copy a tensor piece by piece; returns its checksum."""
    total = pieces.tensor.num_bytes
    checksums = []
    for first in range(0, total, SEAL_PIECE_BYTES):
        data = pieces.read(first, min(SEAL_PIECE_BYTES, total - first))
        writer.write(data.data)
        checksums.append(codec.checksum(torch.from_numpy(data)))
    return seal(checksums, codec)


def _header_room(raw: bytes) -> int:
    """Bytes for a header not known yet, which leave every tensor its address modulo a cache line.

    An entry of a packed tensor is no longer than that of the source: a shorter shape and dtype,
    smaller offsets. The fingerprint is new.
    """
    needed = len(raw) + 256
    return needed + (len(raw) - needed) % PADDING_BYTES


def _header(
    source: Path,
    raw: bytes,
    offsets: Mapping[str, tuple[int, int]],
    runs: Mapping[str, object],
    fingerprint: str,
) -> bytes:
    header = header_object(source, raw)
    metadata = {**(header.pop(METADATA, None) or {}), FILE_MARK: fingerprint}
    entries = {}
    for name, entry in header.items():
        start, end = offsets[name]
        packed = {"dtype": "U8", "shape": [end - start]} if name in runs else {}
        entries[name] = {**entry, **packed, "data_offsets": [start, end]}
    return json.dumps(
        {METADATA: metadata, **entries}, separators=(",", ":"), ensure_ascii=False
    ).encode()


def _prefixed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _file_pieces(
    reader: IO[bytes], offset: int, num_bytes: int, piece_bytes: int = SEAL_PIECE_BYTES
) -> Iterator[Blob]:
    reader.seek(offset)
    for first in range(0, num_bytes, piece_bytes):
        data = np.empty(min(piece_bytes, num_bytes - first), np.uint8)
        if reader.readinto(data.data) != data.nbytes:  # type: ignore[attr-defined]
            raise CheckpointError(
                f"{reader.name} ends inside the {num_bytes} bytes at offset {offset}; "
                "restore the file and start again"
            )
        yield data


def _data_offset(tensor: FileTensor) -> int:
    return tensor.packed_offset if isinstance(tensor, PackedTensor) else tensor.offset
