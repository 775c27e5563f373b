"""One projection of the experts in all slots, as it lies in the slab, in any weight format."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from moe_runtime.kernels.launch import (
    FLOATS,
    UnsupportedKernelError,
    check_dtype,
    check_shape,
)
from moe_runtime.kernels.scaled_blocks import FP8_BLOCK, MXFP4_GROUP

# S slots, N outputs (weight rows), K inputs (weight columns), G weights that share a scale

WeightFormat = Literal["plain", "int8", "fp8", "int4", "mxfp4"]

_MAX_SLOT_ELEMENTS = 2**31  # places within a slot are counted in int32


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotWeights:
    """Weights `W[s]` of shape `[N, K]` for `y = W x`, one for each slot s.

    All tensors are strided views whose first dimension walks over the slots, so they may lie
    between other parameters of the same slab, and stored `[K, N]` ("transposed") is `values.mT`.

    | format | values | scales | a weight is |
    |---|---|---|---|
    | plain | bf16, fp16 or fp32 | none | value |
    | int8 | int8 | `[S, N]` float | value * scale |
    | fp8 | float8_e4m3fn | `[S, ceil(N / 128), ceil(K / 128)]` float | value * scale |
    | int4 | `[S, N, K / 2]` uint8 | `[S, N, K / group]` float | (code - 8) * scale |
    | mxfp4 | `[S, N, K / 2]` uint8 | `[S, N, K / 32]` uint8 | e2m1(code) * 2^(scale - 127) |

    Values are `[S, N, K]`; of two codes in a byte the low one is the even column's.
    `group` is that of int4: a power of two from 16 to 128. `bias` is `[S, N]`.

    A weight may stand in P equal parts of its rows, as gate and up of checkpoints do: values
    `[S, P, N / P, K]`, and scales of each part for itself, `[S, P, ...]`.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    format: WeightFormat = "plain"
    group: int = 0


def group_of(weight_format: str, group: int) -> int:
    """Weights of a row that share a scale in the formats of four bits, 1 in others."""
    return {"mxfp4": MXFP4_GROUP, "int4": group}.get(weight_format, 1)


def num_inputs(columns: int, weight_format: str) -> int:
    """Weights of a row of so many values."""
    return columns * 2 if weight_format in ("int4", "mxfp4") else columns


def strides_of(tensor: torch.Tensor, *, has_parts: bool) -> tuple[int, int, int, int]:
    """Those of slot, part, row and column of values or scales, as kernels take them.

    Scales of rows have no columns, and their last stride is any.
    """
    slot, *rest = tensor.stride() if has_parts else tensor.unsqueeze(1).stride()
    return slot, rest[0], rest[1], rest[-1]


def check_weights(
    values: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_format: str,
    group: int,
) -> tuple[int, int, int]:
    """(S, N, K) with all rows of all parts, or an error that says what the format asks for."""
    if weight_format not in get_args(WeightFormat):
        raise UnsupportedKernelError(
            f"format is {weight_format!r}; supported: {', '.join(get_args(WeightFormat))}"
        )
    check_shape("values", values, (None,) * (4 if values.dim() == 4 else 3))
    S, *parts, rows, columns = values.shape
    N, K = math.prod(parts) * rows, num_inputs(columns, weight_format)
    if N < 1 or K < 1:
        raise UnsupportedKernelError(f"values have shape {tuple(values.shape)}: no weights in it")
    for name, tensor in (("values", values), ("scales", scales), ("bias", bias)):
        if tensor is not None:
            _check_reach(name, tensor)
    if bias is not None:
        check_shape("bias", bias, (S, N))
        check_dtype("bias", bias, FLOATS)
    if weight_format == "plain":
        check_dtype("values", values, FLOATS)
        if scales is not None:
            raise UnsupportedKernelError("scales are given, and plain weights have none")
        return S, N, K
    if scales is None:
        raise UnsupportedKernelError(f"scales are missing: {weight_format} weights need them")
    if weight_format == "int4" and group not in (16, 32, 64, 128):
        raise UnsupportedKernelError(f"group is {group}; supported: 16, 32, 64, 128")
    size = group_of(weight_format, group)
    if K % size:
        raise UnsupportedKernelError(
            f"{weight_format} weights have {K} columns, which must be divisible by the group "
            f"({size})"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "int8": (rows,),
        "fp8": (-(-rows // FP8_BLOCK), -(-K // FP8_BLOCK)),
    }
    check_shape("scales", scales, (S, *parts, *shapes.get(weight_format, (rows, K // size))))
    packed, exponents = (torch.uint8,), (torch.uint8,)
    check_dtype(
        "values",
        values,
        {"int8": (torch.int8,), "fp8": (torch.float8_e4m3fn,)}.get(weight_format, packed),
    )
    check_dtype("scales", scales, exponents if weight_format == "mxfp4" else FLOATS)
    return S, N, K


def _check_reach(name: str, tensor: torch.Tensor) -> None:
    reach = sum(
        (size - 1) * stride
        for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )
    if reach >= _MAX_SLOT_ELEMENTS:
        raise UnsupportedKernelError(
            f"{name} of one slot span {reach + 1} elements; the kernels reach "
            f"{_MAX_SLOT_ELEMENTS}: split the projection"
        )
