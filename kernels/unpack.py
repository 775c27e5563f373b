"""bf16 weights from packed blocks: 12 bits a weight, and a list of those that need more."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton's language has no types of Python's.)

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.launch import (
    UnsupportedKernelError,
    check_device,
    check_dtype,
    check_shape,
    on_device_of,
)

# N rows and K columns of a weight, P blocks of B bytes

TILE = 128  # weights that are packed together; the rest of a row is its tail
GROUP_WEIGHTS = 4096  # rows that share an entry of the escape index hold this many
HEADER_BYTES = 64
TABLE_OFFSET = 32  # in the header: high bytes by code
_CHUNK = 1024  # weights that a program unpacks at a time


def unpack(blocks_PB: torch.Tensor, N: int, K: int, rows_per_block: int) -> torch.Tensor:
    """`[N, K]` bf16, every bit as it was before packing, from uint8 blocks one behind the other.

    Each block holds `rows_per_block` rows, the last one the rest. The low byte of a weight (last
    exponent bit, mantissa) stands as it is; its high byte (sign, seven exponent bits) is a code of
    4 bits for one of 15 bytes in the block's header, or code 15 for the next byte of the block's
    escape list. An index tells each group of rows, of 4096 weights or one row, where in that list
    it begins, so that groups are unpacked side by side. `docs/formats.md` has the layout.

    Checksums are the reader's business: a damaged block gives wrong weights, and reads nothing
    outside of itself.

    Example, a row of three: low bytes 80 00 C0, codes 1 0 15, high bytes 3F BF and the escape 00
    are BF80 3F00 00C0: -1.0, 0.5 and a denormal.
    """
    weights_NK = blocks_PB.new_empty(max(N, 0), max(K, 0), dtype=torch.bfloat16)
    unpack_into(blocks_PB, weights_NK, rows_per_block)
    return weights_NK


def unpack_into(blocks_PB: torch.Tensor, weights_NK: torch.Tensor, rows_per_block: int) -> None:
    """The same, written to contiguous bf16 `[N, K]`."""
    _unpack(blocks_PB, weights_NK, rows_per_block)


def row_bytes(K: int) -> int:
    """Bytes of one packed row: low bytes and codes, without escapes."""
    tail = K % TILE
    return K // TILE * (TILE + TILE // 2) + tail + (tail + 1) // 2


def group_rows(K: int) -> int:
    """Rows that share an entry of the escape index."""
    return -(-GROUP_WEIGHTS // K)


@torch.library.custom_op("moe_runtime::unpack", mutates_args=("weights_NK",))
def _unpack(blocks_PB: torch.Tensor, weights_NK: torch.Tensor, rows_per_block: int) -> None:
    check_device(_unpack_kernel, blocks_PB=blocks_PB, weights_NK=weights_NK)
    check_dtype("blocks_PB", blocks_PB, (torch.uint8,))
    check_dtype("weights_NK", weights_NK, (torch.bfloat16,))
    check_shape("weights_NK", weights_NK, (None, None))
    N, K = weights_NK.shape
    if N < 1 or K < 1 or rows_per_block < 1:
        raise UnsupportedKernelError(
            f"N ({N}), K ({K}) and rows_per_block ({rows_per_block}) must be positive"
        )
    if not weights_NK.is_contiguous():
        raise UnsupportedKernelError(
            f"weights_NK has strides {weights_NK.stride()}: pass contiguous rows"
        )
    num_blocks = -(-N // rows_per_block)
    check_shape("blocks_PB", blocks_PB, (num_blocks, None))
    groups_per_block = -(-min(N, rows_per_block) // group_rows(K))
    index_end = HEADER_BYTES + min(N, rows_per_block) * row_bytes(K) + 4 * (groups_per_block + 1)
    if not index_end <= blocks_PB.shape[1] < 2**31:
        raise UnsupportedKernelError(
            f"blocks have {blocks_PB.shape[1]} bytes; {min(N, rows_per_block)} rows of {K} "
            f"weights take {index_end} or more, and less than 2 GiB"
        )
    blocks_PB = blocks_PB.contiguous()
    with on_device_of(blocks_PB):
        _unpack_kernel[(num_blocks * groups_per_block,)](
            blocks_PB,
            weights_NK.view(torch.int16),
            blocks_PB.shape[1],
            N,
            K,
            rows_per_block,
            groups_per_block,
            group_rows(K),
            row_bytes(K),
            HEADER_BYTES=HEADER_BYTES,
            TABLE_OFFSET=TABLE_OFFSET,
            TILE=TILE,
            CHUNK=_CHUNK,
            num_warps=4,
        )


@_unpack.register_fake
def _(blocks_PB: torch.Tensor, weights_NK: torch.Tensor, rows_per_block: int) -> None:
    """It returns nothing."""


@triton.jit
def _load_index(address):
    """An unsigned number of 32 bits at any address, little end first."""
    number = tl.load(address).to(tl.int32)
    number |= tl.load(address + 1).to(tl.int32) << 8
    number |= tl.load(address + 2).to(tl.int32) << 16
    return number | (tl.load(address + 3).to(tl.int32) << 24)


@triton.jit
def _unpack_kernel(
    blocks,
    bits,
    block_bytes,
    num_rows,
    num_columns,
    rows_per_block,
    groups_per_block,
    rows_per_group,
    bytes_per_row,
    HEADER_BYTES: tl.constexpr,
    TABLE_OFFSET: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program unpacks a group of rows, in the order in which their escapes are listed."""
    block = (tl.program_id(0) // groups_per_block).to(tl.int64)
    group = tl.program_id(0) % groups_per_block
    first_row = block * rows_per_block
    rows_here = tl.minimum(num_rows - first_row, rows_per_block).to(tl.int32)
    if group * rows_per_group >= rows_here:  # the last block has fewer groups
        return
    block_start = blocks + block * block_bytes
    groups_here = tl.cdiv(rows_here, rows_per_group)
    index = HEADER_BYTES + rows_here * bytes_per_row
    next_escape = index + 4 * (groups_here + 1) + _load_index(block_start + index + 4 * group)

    TILE_BYTES: tl.constexpr = TILE + TILE // 2
    whole = num_columns // TILE * TILE
    tail = num_columns - whole
    half_tail = (tail + 1) // 2
    tail_start = whole // TILE * TILE_BYTES
    last_row = tl.minimum((group + 1) * rows_per_group, rows_here)
    for row in range(group * rows_per_group, last_row):
        row_start = block_start + HEADER_BYTES + row * bytes_per_row
        for first in range(0, num_columns, CHUNK):
            place = first + tl.arange(0, CHUNK)
            exists = place < num_columns
            # In a tile, halves of 64 places share code bytes, and interleaving lanes of 16 places
            # by eights gives the order of the row.
            p = place % TILE
            tile_start = place // TILE * TILE_BYTES
            tile_column = (place - p) + p // 64 * 64 + p % 16 // 8 * 32 + p % 64 // 16 * 8 + p % 8
            # In the tail weights stand in order, and its halves share code bytes.
            i = place - whole
            is_second = i >= half_tail
            in_tail = i >= 0
            low_at = tl.where(in_tail, tail_start + i, tile_start + p)
            code_at = tl.where(
                in_tail,
                tail_start + tail + tl.where(is_second, i - half_tail, i),
                tile_start + TILE + p % 64,
            )
            is_high_nibble = tl.where(in_tail, is_second, p >= 64)
            column = tl.where(in_tail, place, tile_column)
            low = tl.load(row_start + low_at, mask=exists, other=0).to(tl.int32)
            packed = tl.load(row_start + code_at, mask=exists, other=0).to(tl.int32)
            code = tl.where(is_high_nibble, packed >> 4, packed & 15)
            is_escape = exists & (code == 15)
            count = is_escape.to(tl.int32)
            escape_at = next_escape + tl.cumsum(count, axis=0) - count
            # A damaged index may point anywhere.
            is_inside = (escape_at >= 0) & (escape_at < block_bytes)
            high = tl.load(block_start + TABLE_OFFSET + code, mask=exists, other=0).to(tl.int32)
            escaped = tl.load(block_start + escape_at, mask=is_escape & is_inside, other=0)
            high = tl.where(is_escape, escaped.to(tl.int32), high)
            next_escape += tl.sum(count, axis=0)
            target = (first_row + row) * num_columns + column
            tl.store(bits + target, ((high << 8) | low).to(tl.int16), mask=exists)
