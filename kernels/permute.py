"""Pairs of token and expert in the experts' order, block by block."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton's language has no types of Python's.)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.launch import (
    INDICES,
    UnsupportedKernelError,
    check_device,
    check_dtype,
    check_power_of_two,
    check_shape,
    on_device_of,
)

# T tokens, K experts a token, N = T*K pairs, E experts, B blocks, R = B * block_rows rows
# D model dim, S slots

_CHUNK = 128  # pairs that one program ranks among themselves
_TILE_CHUNKS = 16  # chunks that the scan adds up at a time
_MAX_EXPERTS = 4096
_MAX_BLOCK_ROWS = 256
_MAX_PAIRS = 2**31 - 2**20  # pairs and rows are counted in int32


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedPairs:
    """Where each pair went. Pair n = t * K + k is the k-th expert of token t.

    `pairs_R` holds the pair of each row, -1 in padding; `rows_TK` the row of each pair, -1 where
    it was dropped. Every expert's rows begin at a multiple of `block_rows`, and pairs of one
    expert keep their order. `block_experts_B` holds each block's expert, -1 behind the last one.
    `counts_E` counts the pairs of each expert, without padding.
    """

    pairs_R: torch.Tensor
    rows_TK: torch.Tensor
    block_experts_B: torch.Tensor
    counts_E: torch.Tensor
    block_rows: int


def sort_pairs(
    experts_TK: torch.Tensor,
    *,
    num_experts: int,
    block_rows: int,
    slots_E: torch.Tensor | None = None,
) -> SortedPairs:
    """Sort pairs stably by expert, each expert's rows padded to whole blocks; all tensors int32.

    Dropped are pairs whose expert is none of 0 to E - 1 (as expert parallelism marks rows of other
    ranks), and with `slots_E` (-1: has no slot) those whose expert is not on the device.
    Sizes depend on shapes alone, so nothing waits for the host: R is the most that N pairs of
    min(E, N) experts can take.

    Example: experts ((2, 0), (2, 1)), E 3, block_rows 2: pairs_R (1, -1, 3, -1, 0, 2),
    block_experts_B (0, 1, 2), rows_TK ((4, 0), (5, 2)), counts_E (1, 1, 2).
    """
    pairs_R, rows_TK, block_experts_B, counts_E = _sort_pairs(
        experts_TK, slots_E, num_experts, block_rows
    )
    return SortedPairs(
        pairs_R=pairs_R,
        rows_TK=rows_TK,
        block_experts_B=block_experts_B,
        counts_E=counts_E,
        block_rows=block_rows,
    )


def max_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """The most blocks that the pairs can take: each expert that occurs wastes less than one."""
    occurring = min(num_experts, num_pairs)
    return (num_pairs - occurring) // block_rows + occurring


@torch.library.custom_op("moe_runtime::sort_pairs", mutates_args=())
def _sort_pairs(
    experts_TK: torch.Tensor, slots_E: torch.Tensor | None, num_experts: int, block_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_device(_count_kernel, experts_TK=experts_TK, slots_E=slots_E)
    check_shape("experts_TK", experts_TK, (None, None))
    check_dtype("experts_TK", experts_TK, INDICES)
    check_power_of_two("block_rows", block_rows, 1, _MAX_BLOCK_ROWS)
    if not 1 <= num_experts <= _MAX_EXPERTS:
        raise UnsupportedKernelError(f"num_experts ({num_experts}) must be 1 to {_MAX_EXPERTS}")
    if slots_E is not None:
        check_shape("slots_E", slots_E, (num_experts,))
        check_dtype("slots_E", slots_E, (torch.int32,))
        slots_E = slots_E.contiguous()
    experts_TK = experts_TK.contiguous()
    num_pairs = experts_TK.numel()
    pairs_R, rows_TK, block_experts_B, counts_E = _empty_sorted(experts_TK, num_experts, block_rows)
    if pairs_R.numel() > _MAX_PAIRS:
        raise UnsupportedKernelError(
            f"{num_pairs} pairs in blocks of {block_rows} take {pairs_R.numel()} rows, above "
            f"{_MAX_PAIRS}: pass fewer tokens at a time"
        )
    if num_pairs == 0:
        return pairs_R, rows_TK, block_experts_B, counts_E.zero_()
    num_chunks = triton.cdiv(num_pairs, _CHUNK)
    before_CE = experts_TK.new_empty(2, num_chunks, num_experts, dtype=torch.int32)
    counts_CE, before_CE = before_CE.unbind(0)
    starts_E = torch.empty_like(counts_E)
    meta = {
        "NUM_EXPERTS": num_experts,
        "BINS": triton.next_power_of_2(num_experts + 1),
        "num_warps": 4,
    }
    slots = experts_TK if slots_E is None else slots_E
    pair_meta = {**meta, "HAS_SLOTS": slots_E is not None, "CHUNK": _CHUNK}
    with on_device_of(experts_TK):
        _count_kernel[(num_chunks,)](experts_TK, slots, counts_CE, num_pairs, **pair_meta)
        _scan_kernel[(1,)](
            counts_CE,
            before_CE,
            counts_E,
            starts_E,
            num_chunks,
            BLOCK_ROWS=block_rows,
            TILE_CHUNKS=_TILE_CHUNKS,
            **meta,
        )
        _place_kernel[(num_chunks + block_experts_B.numel(),)](
            experts_TK,
            slots,
            before_CE,
            counts_E,
            starts_E,
            pairs_R,
            rows_TK,
            block_experts_B,
            num_pairs,
            num_chunks,
            BLOCK_ROWS=block_rows,
            **pair_meta,
        )
    return pairs_R, rows_TK, block_experts_B, counts_E


@_sort_pairs.register_fake
def _(
    experts_TK: torch.Tensor, slots_E: torch.Tensor | None, num_experts: int, block_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_sorted(experts_TK, num_experts, block_rows)


def _empty_sorted(
    experts_TK: torch.Tensor, num_experts: int, block_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_blocks = max_blocks(experts_TK.numel(), num_experts, block_rows)
    sizes = ((num_blocks * block_rows,), tuple(experts_TK.shape), (num_blocks,), (num_experts,))
    pairs_R, rows_TK, block_experts_B, counts_E = (
        experts_TK.new_empty(size, dtype=torch.int32) for size in sizes
    )
    return pairs_R, rows_TK, block_experts_B, counts_E


@triton.jit
def _experts_of(
    experts, slots, pair, num_pairs, NUM_EXPERTS: tl.constexpr, HAS_SLOTS: tl.constexpr
):
    """The expert of each pair, NUM_EXPERTS for those that are dropped or do not exist."""
    expert = tl.load(experts + pair, mask=pair < num_pairs, other=-1)
    is_kept = (expert >= 0) & (expert < NUM_EXPERTS)
    expert = tl.where(is_kept, expert, NUM_EXPERTS).to(tl.int32)
    if HAS_SLOTS:
        slot = tl.load(slots + expert, mask=is_kept, other=-1)
        expert = tl.where(slot >= 0, expert, NUM_EXPERTS)
    return expert


@triton.jit
def _count_kernel(
    experts,
    slots,
    counts,
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """counts[c, e]: pairs of expert e in chunk c."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _experts_of(experts, slots, pair, num_pairs, NUM_EXPERTS, HAS_SLOTS)
    found = tl.arange(0, BINS)
    row = counts + chunk.to(tl.int64) * NUM_EXPERTS
    tl.store(row + found, tl.histogram(expert, BINS), mask=found < NUM_EXPERTS)


@triton.jit
def _scan_kernel(
    counts,
    before,
    totals,
    starts,
    num_chunks,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_CHUNKS: tl.constexpr,
):
    """before[c, e]: pairs of expert e in chunks before c; starts[e]: the expert's first row."""
    expert = tl.arange(0, BINS)
    is_expert = expert < NUM_EXPERTS
    total = tl.zeros((BINS,), dtype=tl.int32)
    for first in range(0, num_chunks, TILE_CHUNKS):
        chunk = first + tl.arange(0, TILE_CHUNKS)
        place = chunk[:, None].to(tl.int64) * NUM_EXPERTS + expert[None, :]
        exists = (chunk < num_chunks)[:, None] & is_expert[None, :]
        count = tl.load(counts + place, mask=exists, other=0)
        until = tl.cumsum(count, axis=0)
        tl.store(before + place, total[None, :] + until - count, mask=exists)
        total += tl.sum(count, axis=0)
    padded = (total + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    tl.store(totals + expert, total, mask=is_expert)
    tl.store(starts + expert, tl.cumsum(padded, axis=0) - padded, mask=is_expert)


@triton.jit
def _place_chunk(
    experts,
    slots,
    before,
    starts,
    pairs,
    rows,
    num_pairs,
    chunk,
    NUM_EXPERTS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows of the pairs of a chunk, and the pairs of those rows."""
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _experts_of(experts, slots, pair, num_pairs, NUM_EXPERTS, HAS_SLOTS)
    is_kept = expert < NUM_EXPERTS
    # Loaded again, as a row: pairs of the chunk are ranked by comparing all with all.
    other = chunk * CHUNK + tl.arange(0, CHUNK)
    other_expert = _experts_of(experts, slots, other, num_pairs, NUM_EXPERTS, HAS_SLOTS)
    is_before = (other_expert[None, :] == expert[:, None]) & (other[None, :] < pair[:, None])
    row = tl.sum(is_before.to(tl.int32), axis=1)
    row += tl.load(starts + expert, mask=is_kept, other=0)
    row += tl.load(before + chunk.to(tl.int64) * NUM_EXPERTS + expert, mask=is_kept, other=0)
    tl.store(pairs + row, pair, mask=is_kept)
    tl.store(rows + pair, tl.where(is_kept, row, -1), mask=pair < num_pairs)


@triton.jit
def _name_block(
    totals,
    starts,
    pairs,
    block_experts,
    block,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The expert of a block, and -1 for the rows that are its padding."""
    expert = tl.arange(0, BINS)
    is_expert = expert < NUM_EXPERTS
    start = tl.load(starts + expert, mask=is_expert, other=0)
    count = tl.load(totals + expert, mask=is_expert, other=0)
    end = start + (count + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    own = tl.sum((is_expert & (end <= block * BLOCK_ROWS)).to(tl.int32), axis=0)
    tl.store(block_experts + block, tl.where(own < NUM_EXPERTS, own, -1))
    filled = tl.sum(tl.where(expert == own, start + count, 0), axis=0)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tl.store(pairs + row, tl.full((BLOCK_ROWS,), -1, tl.int32), mask=row >= filled)


@triton.jit
def _place_kernel(
    experts,
    slots,
    before,
    totals,
    starts,
    pairs,
    rows,
    block_experts,
    num_pairs,
    num_chunks,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The first programs place a chunk of pairs each, the others name a block each."""
    program = tl.program_id(0)
    if program < num_chunks:
        _place_chunk(
            experts,
            slots,
            before,
            starts,
            pairs,
            rows,
            num_pairs,
            program,
            NUM_EXPERTS,
            HAS_SLOTS,
            CHUNK,
        )
    else:
        _name_block(
            totals,
            starts,
            pairs,
            block_experts,
            program - num_chunks,
            NUM_EXPERTS,
            BINS,
            BLOCK_ROWS,
        )
