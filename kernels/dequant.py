"""Quantised experts as ordinary weights: the load of the grouped product, written to memory."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton's language has no types of Python's.)

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.launch import (
    FLOATS,
    UnsupportedKernelError,
    check_device,
    on_device_of,
)
from moe_runtime.kernels.scaled_blocks import FP8_BLOCK
from moe_runtime.kernels.slot_weights import SlotWeights, check_weights, group_of
from moe_runtime.kernels.weight_tile import column_scale, load_tile, row_scale

# S slots, N outputs (weight rows), K inputs (weight columns)

_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 128


def dequantize(weights: SlotWeights, dtype: torch.dtype) -> torch.Tensor:
    """`[S, N, K]` contiguous in `dtype`: each weight computed in float32 and rounded once.

    Example, mxfp4: scale byte 128 (2^1), codes 2 and 11 (1.0 and -1.5) are 2.0 and -3.0.
    """
    dense_SNK: torch.Tensor = _dequantize(
        weights.values, weights.scales, weights.format, weights.group, dtype
    )
    return dense_SNK


@torch.library.custom_op("moe_runtime::dequantize", mutates_args=())
def _dequantize(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    weight_format: str,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    check_device(_dequantize_kernel, needs_fp8=weight_format == "fp8", values=values, scales=scales)
    S, N, K = check_weights(values, scales, None, weight_format, group)
    if scales is None:
        raise UnsupportedKernelError("plain weights need no dequantising: use them as they are")
    if dtype not in FLOATS:
        raise UnsupportedKernelError(f"dtype is {dtype}; supported: {', '.join(map(str, FLOATS))}")
    dense_SNK = values.new_empty(S, N, K, dtype=dtype)
    tiles = triton.cdiv(N, _BLOCK_ROWS) * triton.cdiv(K, _BLOCK_COLUMNS)
    if dense_SNK.numel() == 0:
        return dense_SNK
    with on_device_of(values):
        _dequantize_kernel[(S * tiles,)](
            values,
            *values.stride(),
            scales,
            *scales.stride()[:2],
            scales.stride(-1),
            dense_SNK,
            N,
            K,
            FORMAT=weight_format,
            GROUP=group_of(weight_format, group),
            FP8_SQUARE=FP8_BLOCK,
            BLOCK_N=_BLOCK_ROWS,
            BLOCK_K=_BLOCK_COLUMNS,
            EVEN_K=K % _BLOCK_COLUMNS == 0,
            num_warps=4,
        )
    return dense_SNK


@_dequantize.register_fake
def _(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    weight_format: str,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    S, N, columns = values.shape
    K = columns * 2 if weight_format in ("int4", "mxfp4") else columns
    return values.new_empty(S, N, K, dtype=dtype)


@triton.jit
def _dequantize_kernel(
    values,
    stride_vs,
    stride_vn,
    stride_vk,
    scales,
    stride_ss,
    stride_sn,
    stride_sk,
    dense,
    num_rows,
    num_columns,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FP8_SQUARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One program writes one tile of one slot."""
    column_tiles = tl.cdiv(num_columns, BLOCK_K)
    tiles = tl.cdiv(num_rows, BLOCK_N) * column_tiles
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tile // column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = tile % column_tiles * BLOCK_K
    is_row = row < num_rows
    scales += slot * stride_ss
    number = load_tile(
        values + slot * stride_vs,
        stride_vn,
        stride_vk,
        scales,
        stride_sn,
        stride_sk,
        row,
        is_row,
        first_column,
        num_columns,
        tl.float32,
        FORMAT,
        GROUP,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )
    if FORMAT == "int8":
        number *= row_scale(scales, stride_sn, row, is_row)[:, None]
    if FORMAT == "fp8":
        number *= column_scale(scales, stride_sn, stride_sk, row, is_row, first_column, FP8_SQUARE)[
            :, None
        ]
    column = first_column + tl.arange(0, BLOCK_K)
    place = (slot * num_rows + row[:, None]) * num_columns + column[None, :]
    tl.store(
        dense + place,
        number.to(dense.dtype.element_ty),
        mask=is_row[:, None] & (column < num_columns)[None, :],
    )
