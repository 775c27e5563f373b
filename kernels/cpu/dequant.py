"""Dequantises fp8 and mxfp4 weights to bfloat16 by the C library beside this file."""

import ctypes

import torch

from moe_runtime.kernels.cpu.dequant_status import LEVELS, dequant_status, open_dequant_library
from moe_runtime.kernels.cpu.openmp import find_openmp
from moe_runtime.kernels.scaled_blocks import Dequantizer, ScaledWeights, TorchDequantizer

# N rows and K columns of a weight


class _Dequant(ctypes.Structure):
    """`struct moe_dequant`."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("is_transposed", ctypes.c_int32),
        ("is_mxfp4", ctypes.c_int32),
        ("level", ctypes.c_int64),
        ("openmp", ctypes.c_void_p),
    )


class CpuDequantizer:
    """`Dequantizer` to bfloat16 on torch's threads; torch computes what is not for it."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self.level = level
        self._run = library.moe_dequant_run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._run.restype = None
        self._openmp = find_openmp()
        self._torch = TorchDequantizer()

    def run(self, weights: ScaledWeights, dense_NK: torch.Tensor) -> None:
        weights.check(dense_NK)
        N, K = weights.shape
        if not _fits(weights, dense_NK):
            self._torch.run(weights, dense_NK)
            return
        scales = weights.scales if weights.format == "mxfp4" else weights.scales.float()
        is_transposed = dense_NK.stride(1) != 1
        operation = _Dequant(
            weights.values.data_ptr(),
            scales.data_ptr(),
            dense_NK.data_ptr(),
            N,
            K,
            dense_NK.stride(1 if is_transposed else 0),
            is_transposed,
            weights.format == "mxfp4",
            self.level,
            None if self._openmp is None else ctypes.addressof(self._openmp),
        )
        self._run(ctypes.addressof(operation), torch.get_num_threads())


def _fits(weights: ScaledWeights, dense_NK: torch.Tensor) -> bool:
    """Whether the library can: bfloat16 rows, or columns, that lie one behind the other."""
    return (
        dense_NK.dtype == torch.bfloat16
        and 1 in dense_NK.stride()
        and all(t.is_cpu for t in (dense_NK, weights.values, weights.scales))
        and weights.values.is_contiguous()
        and weights.scales.is_contiguous()
    )


def load_dequantizer(level: str | None = None) -> Dequantizer:
    """The fastest one here. `level` asks for "torch", "c", "avx2" or "avx512".

    Raises ValueError for a level that this CPU lacks, or that needs a library which was not built.
    """
    library = open_dequant_library()
    if level == "torch" or (level is None and isinstance(library, str)):
        return TorchDequantizer()
    levels = () if isinstance(library, str) else LEVELS[: library.moe_dequant_levels() + 1]
    if isinstance(library, str) or (level is not None and level not in levels):
        raise ValueError(
            f"level {level!r} is not available here: {dequant_status()}; "
            f"choose from {', '.join(('torch', *levels))}"
        )
    return CpuDequantizer(library, LEVELS.index(level or levels[-1]))
