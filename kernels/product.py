"""The kernel of the grouped product: by matrix instructions, or on ordinary units for few rows."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton's language has no types of Python's.)

import triton
import triton.language as tl

from moe_runtime.kernels.gate import apply_gate
from moe_runtime.kernels.weight_tile import column_scale, load_tile, row_scale, weight_rows


@triton.jit
def _block_and_tile(num_blocks, tiles, GROUP_BLOCKS: tl.constexpr):
    """(block of rows, tile of outputs) of this program: GROUP_BLOCKS blocks share each tile."""
    program = tl.program_id(0)
    in_group = GROUP_BLOCKS * tiles
    first = program // in_group * GROUP_BLOCKS
    size = tl.minimum(num_blocks - first, GROUP_BLOCKS)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def _slot_of(slots, expert, num_experts, num_slots):
    """The expert's slot, or -1: also for a table that names what does not exist."""
    slot = tl.load(slots + expert, mask=expert < num_experts, other=-1)
    return tl.where(slot < num_slots, slot, -1).to(tl.int64)


@triton.jit
def _rows_of_tile(
    tile, num_outputs, IS_GATED: tl.constexpr, IS_INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):
    """(weight rows of a tile, whether they exist): gate and up of an output side by side."""
    if IS_GATED:
        output = tile * (BLOCK // 2) + tl.arange(0, BLOCK) // 2
        half = tl.arange(0, BLOCK) % 2
        if IS_INTERLEAVED:
            row = 2 * output + half
        else:
            row = output + half * num_outputs
    else:
        output = tile * BLOCK + tl.arange(0, BLOCK)
        row = output
    return row, output < num_outputs


@triton.jit
def _store_nothing_found(
    out, first_row, is_row, tile, num_outputs, BLOCK_ROWS: tl.constexpr, OUTPUTS: tl.constexpr
):
    """NaN for the rows of an expert that has no slot."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    tl.store(
        out + row[:, None] * num_outputs + column[None, :],
        tl.full((BLOCK_ROWS, OUTPUTS), float("nan"), tl.float32).to(out.dtype.element_ty),
        mask=is_row[:, None] & (column < num_outputs)[None, :],
    )


@triton.jit
def _finish(
    total,
    scales,
    scale_row,
    bias,
    stride_bn,
    out,
    first_row,
    is_row,
    tile,
    num_outputs,
    weight_row,
    is_weight_row,
    alpha,
    limit,
    FORMAT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Scale, bias, gate and store of the float32 sums of a tile."""
    if FORMAT == "int8":
        total *= row_scale(scales, scale_row, is_weight_row)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + weight_row * stride_bn, mask=is_weight_row, other=0.0).to(
            tl.float32
        )[None, :]
    if ACTIVATION != "none":
        gate, up = tl.split(tl.reshape(total, (BLOCK_ROWS, OUTPUTS, 2)))
        total = apply_gate(gate, up, alpha, limit, ACTIVATION)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    tl.store(
        out + row[:, None] * num_outputs + column[None, :],
        total.to(out.dtype.element_ty),
        mask=is_row[:, None] & (column < num_outputs)[None, :],
    )


@triton.jit
def product_kernel(
    x,
    stride_xr,
    stride_xk,
    values,
    stride_vs,
    stride_vp,
    stride_vn,
    stride_vk,
    scales,
    stride_ss,
    stride_sp,
    stride_sn,
    stride_sk,
    bias,
    stride_bs,
    stride_bn,
    out,
    slots,
    pairs,
    block_experts,
    num_experts,
    num_slots,
    num_blocks,
    num_outputs,
    num_inputs,
    part_rows,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FP8_SQUARE: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    MATRIX_ROWS: tl.constexpr,
):
    """One program: a block of rows of one expert times BLOCK_OUTPUTS of its weight rows.

    With fewer than MATRIX_ROWS rows weights go from memory to registers and nowhere else: nothing
    is padded to the shapes of matrix instructions, and memory is the only limit. Sums then stay
    spread over the columns of a tile until the end.
    """
    IS_GATED: tl.constexpr = ACTIVATION != "none"
    OUTPUTS: tl.constexpr = BLOCK_OUTPUTS // 2 if IS_GATED else BLOCK_OUTPUTS
    block, tile = _block_and_tile(num_blocks, tl.cdiv(num_outputs, OUTPUTS), GROUP_BLOCKS)
    expert = tl.load(block_experts + block)
    if expert < 0:
        return
    first_row = block.to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    pair = tl.load(pairs + row)
    is_row = pair >= 0
    slot = _slot_of(slots, expert, num_experts, num_slots)
    if slot < 0:
        _store_nothing_found(out, first_row, is_row, tile, num_outputs, BLOCK_ROWS, OUTPUTS)
        return
    weight_row, is_weight_row = _rows_of_tile(
        tile, num_outputs, IS_GATED, IS_INTERLEAVED, BLOCK_OUTPUTS
    )
    value_row, scale_row = weight_rows(
        weight_row,
        part_rows,
        stride_vp,
        stride_vn,
        stride_sp,
        stride_sn,
        FORMAT,
        FP8_SQUARE,
        HAS_PARTS,
    )
    values += slot * stride_vs
    scales += slot * stride_ss
    x_row = (pair // TOP_K).to(tl.int64) if TOP_K else row
    x_rows = x + x_row[:, None] * stride_xr

    if BLOCK_ROWS >= MATRIX_ROWS:
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), dtype=tl.float32)
    else:
        sums = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS, BLOCK_INPUTS), dtype=tl.float32)
    for first in range(0, num_inputs, BLOCK_INPUTS):
        column = first + tl.arange(0, BLOCK_INPUTS)
        mask = is_row[:, None]
        if not EVEN_K:
            mask = mask & (column < num_inputs)[None, :]
        left = tl.load(x_rows + column[None, :] * stride_xk, mask=mask, other=0.0)
        right = load_tile(
            values,
            value_row,
            stride_vk,
            scales,
            scale_row,
            stride_sk,
            is_weight_row,
            first,
            num_inputs,
            x.dtype.element_ty,
            FORMAT,
            GROUP,
            BLOCK_OUTPUTS,
            BLOCK_INPUTS,
            EVEN_K,
        )
        if FORMAT == "fp8":
            scale = column_scale(scales, scale_row, stride_sk, is_weight_row, first, FP8_SQUARE)
        if BLOCK_ROWS < MATRIX_ROWS:
            right = right.to(tl.float32)
            if FORMAT == "fp8":
                right *= scale[:, None]
            sums += left.to(tl.float32)[:, None, :] * right[None, :, :]
        else:
            if IN_FLOAT32:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            if FORMAT == "fp8":
                product = tl.dot(left, tl.trans(right), input_precision="ieee")
                total += product * scale[None, :]
            else:
                total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    if BLOCK_ROWS < MATRIX_ROWS:
        total = tl.sum(sums, axis=2)
    _finish(
        total,
        scales,
        scale_row,
        bias + slot * stride_bs,
        stride_bn,
        out,
        first_row,
        is_row,
        tile,
        num_outputs,
        weight_row,
        is_weight_row,
        alpha,
        limit,
        FORMAT,
        HAS_BIAS,
        ACTIVATION,
        BLOCK_ROWS,
        OUTPUTS,
    )
