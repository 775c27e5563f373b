"""The load that all kernels share: one tile of an expert's weights, in any format, as numbers."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton's language has no types of Python's.)

import triton
import triton.language as tl

# N weight rows (outputs), K weight columns (inputs) of a tile


@triton.jit
def decode_e2m1(code):
    """float32 of four-bit floats: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    exponent = (code >> 1) & 3
    fraction = code & 1
    halves = tl.where(exponent == 0, fraction, (2 + fraction) << tl.maximum(exponent - 1, 0))
    magnitude = halves.to(tl.float32) * 0.5
    return tl.where((code & 8) != 0, -magnitude, magnitude)


@triton.jit
def decode_e8m0(code):
    """float32 of 2^(code - 127); 255 is NaN. By bits, because exp2 is an approximation on GPUs."""
    bits = code.to(tl.int32) << 23
    power = tl.where(bits == 0, 0x00400000, bits).to(tl.float32, bitcast=True)
    return tl.where(code == 255, float("nan"), power)


@triton.jit
def weight_rows(
    row_N,
    part_rows,
    stride_vp,
    stride_vn,
    stride_sp,
    stride_sn,
    FORMAT: tl.constexpr,
    FP8_SQUARE: tl.constexpr,
    HAS_PARTS: tl.constexpr,
):
    """Where values and scales of rows begin in a slot, of which each part has `part_rows`."""
    part = row_N // part_rows if HAS_PARTS else tl.zeros_like(row_N)
    row_N -= part * part_rows
    value_N = part * stride_vp + row_N * stride_vn
    if FORMAT == "fp8":  # a part begins with a square of its own
        row_N = row_N // FP8_SQUARE
    return value_N, part * stride_sp + row_N * stride_sn


@triton.jit
def load_tile(
    values,
    value_N,
    stride_vk,
    scales,
    scale_N,
    stride_sk,
    is_row_N,
    first_column,
    num_columns,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """`[BLOCK_N, BLOCK_K]` in `dtype`: rows at `value_N`, columns from `first_column`; 0 outside.

    `values` and `scales` point to the expert's slot. Formats of four bits are scaled here. int8 and
    fp8 are not: their scales are applied to sums, where they cost less and round less
    (`column_scale`, `row_scale`).
    """
    if FORMAT == "int4" or FORMAT == "mxfp4":
        pair = first_column // 2 + tl.arange(0, BLOCK_K // 2)
        mask = is_row_N[:, None] & (pair * 2 < num_columns)[None, :]
        packed = tl.load(
            values + value_N[:, None] + pair[None, :] * stride_vk, mask=mask, other=0
        ).to(tl.int32)
        code = tl.interleave(packed & 15, packed >> 4)
        # A group may be wider than the tile, or the tile hold several.
        GROUPS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
        group = first_column // GROUP + tl.arange(0, GROUPS)
        scale = tl.load(
            scales + scale_N[:, None] + group[None, :] * stride_sk,
            mask=is_row_N[:, None] & (group * GROUP < num_columns)[None, :],
            other=0,
        )
        if FORMAT == "int4":
            number = (code - 8).to(tl.float32)
            scale = scale.to(tl.float32)
        else:
            number = decode_e2m1(code)
            scale = decode_e8m0(scale)
        number = tl.reshape(number, (BLOCK_N, GROUPS, BLOCK_K // GROUPS)) * scale[:, :, None]
        tile = tl.reshape(number, (BLOCK_N, BLOCK_K))
        if not EVEN_K:  # an int4 code of 0 is -8, and a scale beyond the end may not be
            column = first_column + tl.arange(0, BLOCK_K)
            tile = tl.where((column < num_columns)[None, :], tile, 0.0)
        return tile.to(dtype)
    else:
        column = first_column + tl.arange(0, BLOCK_K)
        mask = is_row_N[:, None]
        if not EVEN_K:
            mask = mask & (column < num_columns)[None, :]
        address = values + value_N[:, None] + column[None, :] * stride_vk
        if FORMAT == "fp8":
            # Eight-bit floats have no number to stand for masked places in all versions.
            tile = tl.load(address, mask=mask).to(tl.float32)
            return tl.where(mask, tile, 0.0).to(dtype)
        elif FORMAT == "int8":
            # By way of float32: the interpreter mistakes integers for the bits of bf16.
            return tl.load(address, mask=mask, other=0).to(tl.float32).to(dtype)
        else:
            return tl.load(address, mask=mask, other=0.0).to(dtype)


@triton.jit
def column_scale(scales, scale_N, stride_sk, is_row_N, first_column, FP8_SQUARE: tl.constexpr):
    """`[BLOCK_N]`: the fp8 scales of the rows for a tile of columns, all in one square."""
    return tl.load(
        scales + scale_N + (first_column // FP8_SQUARE) * stride_sk, mask=is_row_N, other=0.0
    ).to(tl.float32)


@triton.jit
def row_scale(scales, scale_N, is_row_N):
    """`[BLOCK_N]`: the int8 scales of the rows."""
    return tl.load(scales + scale_N, mask=is_row_N, other=0.0).to(tl.float32)
