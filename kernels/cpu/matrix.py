"""A weight matrix as the experts' kernel reads it: rows in one or more places and forms."""

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from moe_runtime.kernels.packed_blocks import HEADER_BYTES, MAGIC, index_entries, row_bytes
from moe_runtime.kernels.quantise import QuantisedDtype, int4_groups
from moe_runtime.kernels.scaled_blocks import FP8_BLOCK, MXFP4_GROUP, ScaledFormat

# N rows and K columns of the matrix, n rows of a part


class Form(IntEnum):
    """How rows stand in memory, as `enum form` of matrix_rows.h numbers them."""

    PLAIN = 0
    PACKED = 1
    INT8 = 2
    INT4 = 3
    FP8 = 4
    MXFP4 = 5


FORMS: Mapping[QuantisedDtype | ScaledFormat, Form] = {
    "int8": Form.INT8,
    "int4": Form.INT4,
    "fp8": Form.FP8,
    "mxfp4": Form.MXFP4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`num_rows` rows that lie behind each other; formats as in `slot_weights.py`.

    | form | rows | scales | a weight is |
    |---|---|---|---|
    | PLAIN | bfloat16 `[n, K]` | none | value |
    | PACKED | uint8, a block that was checked | none | what unpacking gives |
    | INT8 | int8 `[n, K]` | float32 `[n]` | value * scale |
    | INT4 | uint8 `[n, K / 2]` | bfloat16 `[n, ceil(K / 32)]` | (code - 8) * scale |
    | FP8 | float8_e4m3fn `[n, K]` | float32 `[ceil(n / 128), ceil(K / 128)]` | value * scale |
    | MXFP4 | uint8 `[n, K / 2]` | uint8 `[n, K / 32]` | what dequantising gives |
    """

    form: Form
    num_rows: int
    rows: torch.Tensor
    scales: torch.Tensor | None = None


class _Part(ctypes.Structure):
    """`struct moe_part`."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("form", ctypes.c_int64),
    )


class _Matrix(ctypes.Structure):
    """`struct moe_matrix`."""

    _fields_ = (("parts", ctypes.c_void_p), ("num_parts", ctypes.c_int64))


class Matrix:
    """`[N, K]` weights of bfloat16, or made of such, to multiply bfloat16 rows with.

    The memory of its parts may be written over by the same parts of the same forms and no others.
    Raises ValueError for parts with which the library would read what is not theirs.
    """

    def __init__(self, parts: Sequence[Part], num_columns: int) -> None:
        for part in parts:
            _check(part, num_columns)
        self.shape = (sum(part.num_rows for part in parts), num_columns)
        self._held = tuple(parts)
        self._parts = (_Part * len(parts))(
            *[
                _Part(
                    part.rows.data_ptr(),
                    None if part.scales is None else part.scales.data_ptr(),
                    part.num_rows,
                    part.form,
                )
                for part in parts
            ]
        )
        self._matrix = _Matrix(ctypes.addressof(self._parts), len(parts))
        self.address = ctypes.addressof(self._matrix)


# As it is, or with rows that are packed or quantised.
Weight = torch.Tensor | Matrix


def _check(part: Part, K: int) -> None:
    n = part.num_rows
    if part.form is Form.PACKED:
        _check_tensor("a packed block", part.rows, torch.uint8, tuple(part.rows.shape))
        least = HEADER_BYTES + n * row_bytes(K) + 4 * index_entries(n, K)
        found: tuple[int, ...] = ()
        if part.rows.numel() >= least:
            found = struct.unpack_from("<IIII", part.rows.numpy()[:HEADER_BYTES].tobytes(), 16)
        if found[:3] != (MAGIC, n, K) or least + found[3] > part.rows.numel():
            raise ValueError(
                f"a part of {part.rows.numel()} bytes is no packed block of {n} x {K} weights"
            )
        return
    values: tuple[torch.dtype, int]
    scales: tuple[torch.dtype, tuple[int, ...]] | None = None
    if part.form is Form.INT4:
        if K % 2:
            raise ValueError(f"int4 rows have an even number of weights, got {K}")
        values, scales = (torch.uint8, K // 2), (torch.bfloat16, (n, int4_groups(K)))
    elif part.form is Form.INT8:
        values, scales = (torch.int8, K), (torch.float32, (n,))
    elif part.form is Form.FP8:
        squares = (-(-n // FP8_BLOCK), -(-K // FP8_BLOCK))
        values, scales = (torch.float8_e4m3fn, K), (torch.float32, squares)
    elif part.form is Form.MXFP4:
        if K % MXFP4_GROUP:
            raise ValueError(f"mxfp4 rows have groups of {MXFP4_GROUP} weights, got {K}")
        values, scales = (torch.uint8, K // 2), (torch.uint8, (n, K // MXFP4_GROUP))
    else:
        values = (torch.bfloat16, K)
    _check_tensor("rows", part.rows, values[0], (n, values[1]))
    if scales is not None:
        if part.scales is None:
            raise ValueError(f"{part.form.name} rows have no scales; give them")
        _check_tensor("scales", part.scales, *scales)


def _check_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu:
        return
    raise ValueError(
        f"{name} must be a contiguous {dtype} CPU tensor {list(shape)}, got {list(tensor.shape)} "
        f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
    )
