"""Where the packed weights of a tensor lie: blocks of rows, each with its own checksum."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_runtime.errors import ExpertReadError
from moe_runtime.kernels.packed_blocks import FOREIGN, INTACT, BlockCodec, BlockTask, row_bytes
from moe_runtime.memory.safetensors_header import FileTensor

PACKED_DTYPE = "BF16"
ITEM_BYTES = 2
# A block is read in one piece by one thread, and unpacked while it is in that core's cache.
MAX_BLOCK_BYTES = 640 * 2**10
# Checksums of tensors that are not packed are made of those of such pieces: no need to hold one.
SEAL_PIECE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """`num_rows` rows of `num_columns` weights of a tensor, from its element `first_element`."""

    offset: int  # in the file
    num_bytes: int
    num_rows: int
    num_columns: int
    first_element: int
    identity: int

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.num_columns

    def task(self, packed: torch.Tensor, weights: torch.Tensor | None) -> BlockTask:
        """Checking this block, whose bytes are `packed`, and unpacking it to `weights`, if any."""
        return BlockTask(
            block=packed,
            N=self.num_rows,
            K=self.num_columns,
            identity=self.identity,
            weights=weights,
        )


@dataclass(frozen=True, slots=True)
class PackedRun:
    """Rows that one expert needs together: blocks of `rows_per_block`, `block_bytes` each."""

    num_rows: int
    rows_per_block: int
    block_bytes: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // self.rows_per_block)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class SealedTensor(FileTensor):
    """A tensor as it is, with the checksum of its bytes."""

    checksum: int


@dataclass(frozen=True, slots=True)
class PackedTensor(FileTensor):
    """A bf16 tensor that lies packed in `file`, its runs from `packed_offset` on.

    What it inherits tells of the tensor before it was packed: `offset` and `num_bytes` are those in
    the source's file, so that whoever asks where the unmodified model would hold it is told right.
    """

    packed_offset: int
    runs: tuple[PackedRun, ...]
    packing: str  # the fingerprint of the source

    def blocks(self) -> tuple[PackedBlock, ...]:
        """All blocks, in the order of their weights."""
        return self.blocks_of(0, math.prod(self.shape))

    def blocks_of(self, first_element: int, num_elements: int) -> tuple[PackedBlock, ...]:
        """The blocks that hold any of these elements."""
        end = first_element + num_elements
        identity = first_identity(self.packing, self.name)
        offset, start = self.packed_offset, 0
        found: list[PackedBlock] = []
        for run in self.runs:
            stop = start + run.num_rows * self.shape[-1]
            if start < end and first_element < stop:
                found += (
                    block
                    for block in self._run_blocks(run, offset, start, identity)
                    if block.first_element < end
                    and first_element < block.first_element + block.num_elements
                )
            start, offset, identity = stop, offset + run.num_bytes, identity + run.num_blocks
        return tuple(found)

    def _run_blocks(
        self, run: PackedRun, offset: int, first_element: int, identity: int
    ) -> Iterator[PackedBlock]:
        num_columns = self.shape[-1]
        for i, first_row in enumerate(range(0, run.num_rows, run.rows_per_block)):
            yield PackedBlock(
                offset + i * run.block_bytes,
                run.block_bytes,
                min(run.rows_per_block, run.num_rows - first_row),
                num_columns,
                first_element + first_row * num_columns,
                (identity + i) % 2**64,
            )


def first_identity(packing: str, name: str) -> int:
    """The identity of block 0 of tensor `name`; block `i` has this plus `i`, modulo 2^64."""
    return int.from_bytes(hashlib.sha256(f"{packing} {name}".encode()).digest()[:8], "little")


def rows_per_block(num_rows: int, num_columns: int) -> int:
    """Rows that make equal blocks of at most `MAX_BLOCK_BYTES`, or of one row."""
    most = max(1, MAX_BLOCK_BYTES // row_bytes(num_columns))
    return -(-num_rows // -(-num_rows // most))


def require_intact(status: Sequence[int], blocks: Sequence[PackedBlock], file: Path) -> None:
    """Raise ExpertReadError if `status`, what a codec said of `blocks`, says that one is not."""
    for found, block in zip(status, blocks, strict=True):
        if found == FOREIGN:
            raise ExpertReadError(
                f"{file} holds at offset {block.offset} a block of another packing; its files do "
                "not belong together: pack the model again"
            )
        if found != INTACT:
            raise ExpertReadError(
                f"{file} was altered: the checksum of the packed block at offset {block.offset} is "
                "wrong; copy the folder again, or pack the model again"
            )


def seal(checksums: Sequence[int], codec: BlockCodec) -> int:
    """The checksum of a tensor from those of its pieces of `SEAL_PIECE_BYTES`."""
    words = bytearray(b"".join(value.to_bytes(8, "little") for value in checksums))
    if not words:
        return 0
    return codec.checksum(torch.frombuffer(words, dtype=torch.uint8))


def seal_of(data: torch.Tensor, codec: BlockCodec) -> int:
    """The checksum of a whole tensor that is in memory: `[bytes]` uint8."""
    return seal(
        [codec.checksum(p) for p in torch.split(data, SEAL_PIECE_BYTES) if p.numel()], codec
    )
