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
    check_dtype,
    check_shape,
    on_device_of,
)
from moe_runtime.kernels.scaled_blocks import FP8_BLOCK, ScaledWeights
from moe_runtime.kernels.slot_weights import SlotWeights, check_weights, group_of, strides_of
from moe_runtime.kernels.weight_tile import column_scale, load_tile, row_scale, weight_rows

# S slots, N outputs (weight rows), K inputs (weight columns)

_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 128


def dequantize(weights: SlotWeights, dtype: torch.dtype) -> torch.Tensor:
    """`[S, N, K]` contiguous in `dtype`: each weight computed in float32 and rounded once.

    Example, mxfp4: scale byte 128 (2^1), codes 2 and 11 (1.0 and -1.5) are 2.0 and -3.0.
    """
    shape = check_weights(weights.values, weights.scales, None, weights.format, weights.group)
    dense_SNK = weights.values.new_empty(shape, dtype=dtype)
    dequantize_into(weights, dense_SNK)
    return dense_SNK


def dequantize_into(weights: SlotWeights, dense_SNK: torch.Tensor) -> None:
    """The same, written to a tensor of any strides."""
    _dequantize(weights.values, weights.scales, weights.format, weights.group, dense_SNK)


class TritonDequantizer:
    """`Dequantizer` on a device, in one launch a weight."""

    def run(self, weights: ScaledWeights, dense_NK: torch.Tensor) -> None:
        slot = SlotWeights(
            values=weights.values[None], scales=weights.scales[None], format=weights.format
        )
        dequantize_into(slot, dense_NK[None])


@torch.library.custom_op("moe_runtime::dequantize", mutates_args=("dense_SNK",))
def _dequantize(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    weight_format: str,
    group: int,
    dense_SNK: torch.Tensor,
) -> None:
    check_device(
        _dequantize_kernel,
        needs_fp8=weight_format == "fp8",
        values=values,
        scales=scales,
        dense_SNK=dense_SNK,
    )
    S, N, K = check_weights(values, scales, None, weight_format, group)
    if scales is None:
        raise UnsupportedKernelError("plain weights need no dequantising: use them as they are")
    check_dtype("dense_SNK", dense_SNK, FLOATS)
    check_shape("dense_SNK", dense_SNK, (S, N, K))
    tiles = triton.cdiv(N, _BLOCK_ROWS) * triton.cdiv(K, _BLOCK_COLUMNS)
    if dense_SNK.numel() == 0:
        return
    has_parts = values.dim() == 4
    with on_device_of(values):
        _dequantize_kernel[(S * tiles,)](
            values,
            *strides_of(values, has_parts=has_parts),
            scales,
            *strides_of(scales, has_parts=has_parts),
            dense_SNK,
            *dense_SNK.stride(),
            N,
            K,
            values.shape[-2],
            FORMAT=weight_format,
            GROUP=group_of(weight_format, group),
            FP8_SQUARE=FP8_BLOCK,
            HAS_PARTS=has_parts,
            BLOCK_N=_BLOCK_ROWS,
            BLOCK_K=_BLOCK_COLUMNS,
            EVEN_K=K % _BLOCK_COLUMNS == 0,
            num_warps=4,
        )


@_dequantize.register_fake
def _(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    weight_format: str,
    group: int,
    dense_SNK: torch.Tensor,
) -> None:
    """It returns nothing."""


@triton.jit
def _dequantize_kernel(
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
    dense,
    stride_ds,
    stride_dn,
    stride_dk,
    num_rows,
    num_columns,
    part_rows,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FP8_SQUARE: tl.constexpr,
    HAS_PARTS: tl.constexpr,
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
    value_row, scale_row = weight_rows(
        row,
        part_rows,
        stride_vp,
        stride_vn,
        stride_sp,
        stride_sn,
        FORMAT,
        FP8_SQUARE,
        HAS_PARTS,
    )
    number = load_tile(
        values + slot * stride_vs,
        value_row,
        stride_vk,
        scales,
        scale_row,
        stride_sk,
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
        number *= row_scale(scales, scale_row, is_row)[:, None]
    if FORMAT == "fp8":
        number *= column_scale(scales, scale_row, stride_sk, is_row, first_column, FP8_SQUARE)[
            :, None
        ]
    column = (first_column + tl.arange(0, BLOCK_K)).to(tl.int64)
    place = slot * stride_ds + row.to(tl.int64)[:, None] * stride_dn + column[None, :] * stride_dk
    tl.store(
        dense + place,
        number.to(dense.dtype.element_ty),
        mask=is_row[:, None] & (column < num_columns)[None, :],
    )
