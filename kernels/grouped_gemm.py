"""Products of sorted rows with the weights of their experts, read where they lie in the slots."""

import math
from collections.abc import Sequence
from dataclasses import astuple

import torch
import triton

from moe_runtime.kernels.gate import Gate
from moe_runtime.kernels.launch import (
    FLOATS,
    UnsupportedKernelError,
    check_device,
    check_dtype,
    check_shape,
    is_interpreted,
    on_device_of,
)
from moe_runtime.kernels.permute import SortedPairs
from moe_runtime.kernels.product import product_kernel
from moe_runtime.kernels.scaled_blocks import FP8_BLOCK
from moe_runtime.kernels.slot_weights import SlotWeights, check_weights, group_of, strides_of
from moe_runtime.kernels.tile_settings import MATRIX_ROWS, TileSettings

# T tokens, K experts a token, E experts, S slots, B blocks, R = B * block_rows rows, D model dim,
# F ffn dim

_NO_GATE = "none"


def gate_up(
    x_TD: torch.Tensor,
    weights: SlotWeights,
    slots_E: torch.Tensor,
    order: SortedPairs,
    *,
    gate: Gate,
    settings: TileSettings,
) -> torch.Tensor:
    """`h[r] = gate(W_e x[t])` for the pair (t, e) of each row r: `[R, F]` in x's dtype.

    `weights` are `[S, 2F, D]`, `slots_E` int32 holds each expert's slot, -1 if it has none. Sums
    are float32. Rows of padding are not written; rows of an expert without a slot are NaN, so that
    a missing expert cannot pass for a small one.
    """
    check_shape("x_TD", x_TD, (order.rows_TK.shape[0], None))
    rounded: torch.Tensor = _grouped_gemm(
        x_TD,
        weights.values,
        weights.scales,
        weights.bias,
        slots_E,
        order.pairs_R,
        order.block_experts_B,
        weights.format,
        weights.group,
        order.rows_TK.shape[1],
        order.block_rows,
        gate.activation,
        gate.is_interleaved,
        gate.alpha,
        gate.limit,
        list(astuple(settings)),
    )
    return rounded


def down(
    h_RF: torch.Tensor,
    weights: SlotWeights,
    slots_E: torch.Tensor,
    order: SortedPairs,
    *,
    settings: TileSettings,
) -> torch.Tensor:
    """`y[r] = W_e h[r]`: `[R, D]` in h's dtype, with `weights` `[S, D, F]`; see `gate_up`."""
    check_shape("h_RF", h_RF, (order.pairs_R.shape[0], None))
    rounded: torch.Tensor = _grouped_gemm(
        h_RF,
        weights.values,
        weights.scales,
        weights.bias,
        slots_E,
        order.pairs_R,
        order.block_experts_B,
        weights.format,
        weights.group,
        0,
        order.block_rows,
        _NO_GATE,
        False,
        0.0,
        0.0,
        list(astuple(settings)),
    )
    return rounded


@torch.library.custom_op("moe_runtime::grouped_gemm", mutates_args=())
def _grouped_gemm(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    slots_E: torch.Tensor,
    pairs_R: torch.Tensor,
    block_experts_B: torch.Tensor,
    weight_format: str,
    group: int,
    top_k: int,  # x has a row for each top_k pairs, or with 0 one for each row of pairs_R
    block_rows: int,
    activation: str,
    is_interleaved: bool,
    alpha: float,
    limit: float,
    settings: Sequence[int],
) -> torch.Tensor:
    check_device(
        product_kernel,
        needs_fp8=weight_format == "fp8",
        x=x,
        values=values,
        scales=scales,
        bias=bias,
        slots_E=slots_E,
        pairs_R=pairs_R,
        block_experts_B=block_experts_B,
    )
    S, N, num_inputs = check_weights(values, scales, bias, weight_format, group)
    check_shape("x", x, (None, num_inputs))
    check_dtype("x", x, FLOATS)
    if weight_format == "plain":
        check_dtype("values", values, (x.dtype,))
    check_shape("slots_E", slots_E, (None,))
    num_blocks = block_experts_B.numel()
    check_shape("pairs_R", pairs_R, (num_blocks * block_rows,))
    for name, tensor in (
        ("slots_E", slots_E),
        ("pairs_R", pairs_R),
        ("block_experts_B", block_experts_B),
    ):
        check_dtype(name, tensor, (torch.int32,))
    is_gated = activation != _NO_GATE
    if is_gated and N % 2:
        raise UnsupportedKernelError(f"gate and up have {N} weight rows together: not even")
    block_outputs, block_inputs, num_warps, num_stages, group_blocks = settings
    if weight_format == "fp8":  # a tile of weights must lie in one square of their scales
        block_inputs = min(block_inputs, FP8_BLOCK)
    num_outputs = N // 2 if is_gated else N
    out = x.new_empty(num_blocks * block_rows, num_outputs)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(N, block_outputs)
    has_parts = values.dim() == 4
    with on_device_of(x):
        product_kernel[(num_blocks * tiles,)](
            x,
            *x.stride(),
            values,
            *strides_of(values, has_parts=has_parts),
            values if scales is None else scales,
            *((0,) * 4 if scales is None else strides_of(scales, has_parts=has_parts)),
            x if bias is None else bias,
            *((0, 0) if bias is None else bias.stride()),
            out,
            slots_E.contiguous(),
            pairs_R.contiguous(),
            block_experts_B.contiguous(),
            slots_E.numel(),
            S,
            num_blocks,
            num_outputs,
            num_inputs,
            values.shape[-2],
            alpha,
            limit,
            TOP_K=top_k,
            FORMAT=weight_format,
            GROUP=group_of(weight_format, group),
            FP8_SQUARE=FP8_BLOCK,
            HAS_PARTS=has_parts,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            IS_INTERLEAVED=is_interleaved,
            # The interpreter multiplies matrices of bf16 as if they were integers.
            IN_FLOAT32=is_interpreted(product_kernel) and x.dtype == torch.bfloat16,
            EVEN_K=num_inputs % block_inputs == 0,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTPUTS=block_outputs,
            BLOCK_INPUTS=block_inputs,
            GROUP_BLOCKS=group_blocks,
            MATRIX_ROWS=MATRIX_ROWS,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out


@_grouped_gemm.register_fake
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    slots_E: torch.Tensor,
    pairs_R: torch.Tensor,
    block_experts_B: torch.Tensor,
    weight_format: str,
    group: int,
    top_k: int,
    block_rows: int,
    activation: str,
    is_interleaved: bool,
    alpha: float,
    limit: float,
    settings: Sequence[int],
) -> torch.Tensor:
    N = math.prod(values.shape[1:-1])
    return x.new_empty(pairs_R.shape[0], N if activation == _NO_GATE else N // 2)
