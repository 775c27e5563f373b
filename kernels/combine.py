"""The way back from sorted rows to tokens: gather and weighted sum in one kernel."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton's language has no types of Python's.)

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.launch import FLOATS, check_device, check_dtype, check_shape, on_device_of

# T tokens, K experts a token, R rows, D model dim


def combine(y_RD: torch.Tensor, rows_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """`out[t] = sum over k of weights[t, k] * y[rows[t, k]]`, `[T, D]` in y's dtype.

    Adds in float32 in the order of k and rounds once; dropped pairs (row -1) add nothing.
    """
    out_TD: torch.Tensor = _combine(y_RD, rows_TK, weights_TK)
    return out_TD


@torch.library.custom_op("moe_runtime::combine", mutates_args=())
def _combine(y_RD: torch.Tensor, rows_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    check_device(_combine_kernel, y_RD=y_RD, rows_TK=rows_TK, weights_TK=weights_TK)
    check_shape("y_RD", y_RD, (None, None))
    check_dtype("y_RD", y_RD, FLOATS)
    check_shape("rows_TK", rows_TK, (None, None))
    check_dtype("rows_TK", rows_TK, (torch.int32,))
    check_shape("weights_TK", weights_TK, tuple(rows_TK.shape))
    check_dtype("weights_TK", weights_TK, FLOATS)
    (T, K), D = rows_TK.shape, y_RD.shape[1]
    out_TD = y_RD.new_empty(T, D)
    if out_TD.numel() == 0:
        return out_TD
    block_columns = min(1024, triton.next_power_of_2(D))
    with on_device_of(y_RD):
        _combine_kernel[(T, triton.cdiv(D, block_columns))](
            y_RD,
            rows_TK.contiguous(),
            weights_TK.contiguous(),
            out_TD,
            D,
            y_RD.stride(0),
            y_RD.stride(1),
            TOP_K=K,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
        )
    return out_TD


@_combine.register_fake
def _(y_RD: torch.Tensor, rows_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    return y_RD.new_empty(rows_TK.shape[0], y_RD.shape[1])


@triton.jit
def _combine_kernel(
    y,
    rows,
    weights,
    out,
    num_columns,
    stride_row,
    stride_column,
    TOP_K: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program adds up BLOCK_COLUMNS columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    for k in range(TOP_K):
        row = tl.load(rows + token * TOP_K + k).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + k).to(tl.float32)
        end = tl.where(row >= 0, num_columns, 0)  # nothing is read for a dropped pair
        value = tl.load(
            y + row * stride_row + column.to(tl.int64) * stride_column,
            mask=column < end,
            other=0.0,
        ).to(tl.float32)
        total += tl.where(row >= 0, weight * value, 0.0)
    tl.store(
        out + token * num_columns + column,
        total.to(out.dtype.element_ty),
        mask=column < num_columns,
    )
