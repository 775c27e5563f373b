"""bfloat16 rows as int8 or int4 ones, into memory that is there, by the C library beside this."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from moe_runtime.kernels.cpu.library import open_library
from moe_runtime.kernels.quantise import QuantisedDtype, int4_groups, quantise

# N rows and K columns

_INTERFACE = 1  # the number in quantise.c that changes with a signature

# `w [N, K]` bfloat16, contiguous; writes values and scales as `quantise` has them.
Quantiser = Callable[[torch.Tensor, QuantisedDtype, torch.Tensor, torch.Tensor], None]


def load_quantiser(folder: Path = Path(__file__).parent) -> Quantiser:
    """The C library's, on the calling thread and without the GIL; torch's where there is none."""
    library = open_library(folder, "quantise", _INTERFACE)
    if isinstance(library, str):
        return _by_torch
    run = library.moe_quantise
    run.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
    )
    run.restype = None

    def by_library(
        w_NK: torch.Tensor, dtype: QuantisedDtype, values: torch.Tensor, scales: torch.Tensor
    ) -> None:
        N, K = w_NK.shape
        bits, num_scales = (8, N) if dtype == "int8" else (4, N * int4_groups(K))
        sizes = (2 * N * K, N * K * bits // 8, num_scales * (4 if dtype == "int8" else 2))
        tensors = (w_NK, values, scales)
        if not all(
            t.is_cpu and t.is_contiguous() and t.nbytes == size
            for t, size in zip(tensors, sizes, strict=True)
        ):
            raise ValueError(
                f"weights, values and scales of {N} x {K} as {dtype} must be {sizes} contiguous "
                f"bytes on the CPU, got {tuple(t.nbytes for t in tensors)}"
            )
        run(w_NK.data_ptr(), N, K, dtype == "int4", values.data_ptr(), scales.data_ptr())

    return by_library


def _by_torch(
    w_NK: torch.Tensor, dtype: QuantisedDtype, values: torch.Tensor, scales: torch.Tensor
) -> None:
    for target, found in zip((values, scales), quantise(w_NK, dtype), strict=True):
        target.copy_(found)
