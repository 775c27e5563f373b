"""One-row bf16 linear layers of several experts in one call, by the C library beside this file."""

import ctypes
import math

import torch
from torch.nn import functional

from moe_runtime.kernels.cpu.gemv_status import gemv_status, open_gemv_library
from moe_runtime.kernels.cpu.openmp import find_openmp

# k experts of one call, N rows and K columns of a weight

# How oneDNN was seen to cut K (512 since 2.x), then what it might do elsewhere.
_LIKELY_K_BLOCKS = (512, 1024, 256, 2048, 128, 64, 4096)
_TRIAL_OUTPUTS = 512  # outputs whose bits depend on the order of their sum ...
_MAX_TRIAL_INPUTS = 16  # ... but no more inputs than these for the smallest N
_TRIAL_ROWS = 64  # distinct rows; more rows of a tall weight repeat these


class _Operation(ctypes.Structure):
    """`struct moe_gemv`."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("num_experts", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("k_block", ctypes.c_int64),
        ("openmp", ctypes.c_void_p),
    )


class CpuGemv:
    """`y = W x` for bf16 weights and one row, with the bits of torch and at the memory's rate.

    torch repacks W on each call. Whether this sum has the order of torch's is found by trying, per
    shape: `find_k_block`. Calls run on torch's own OpenMP threads and release the GIL.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.moe_gemv_run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._run.restype = None
        self._openmp = find_openmp()

    @classmethod
    def load(cls) -> "CpuGemv | None":
        """The kernel, or None where `status` says why torch has to do."""
        found = open_gemv_library()
        return None if isinstance(found, str) else cls(found)

    @staticmethod
    def status() -> str:
        """What computes one-row products on this machine, and why."""
        return gemv_status()

    def run(self, weights: list[torch.Tensor], x_kK: torch.Tensor, k_block: int) -> torch.Tensor:
        """Row e is `functional.linear(x[e], weights[e])`: `[k, N]` bf16.

        `weights`: k contiguous bf16 tensors `[N, K]` at any address. `x_kK`: `[k, K]`, or `[1, K]`
        for one input to all. Reads the weights once and nothing outside them; uses
        `torch.get_num_threads()` threads, or one where the work is too small to share.
        """
        N, K = _checked_shape(weights, x_kK, k_block)
        y_kN = torch.empty(len(weights), N, dtype=torch.bfloat16)
        addresses = (ctypes.c_void_p * len(weights))(*[w.data_ptr() for w in weights])
        operation = _Operation(
            ctypes.addressof(addresses),
            x_kK.data_ptr(),
            y_kN.data_ptr(),
            0 if x_kK.shape[0] == 1 else K,
            len(weights),
            N,
            K,
            k_block,
            None if self._openmp is None else ctypes.addressof(self._openmp),
        )
        self._run(ctypes.addressof(operation), torch.get_num_threads())
        return y_kN

    def find_k_block(self, N: int, K: int) -> int | None:
        """The `k_block` with which `run` equals `functional.linear` for this shape, or None.

        Runs both at the present number of torch threads, which decides how torch cuts the sums of
        small N: ask again when it changes. The trial inputs cancel, so that an output is nothing
        but the rounding errors of its sum, and nearly every one betrays a different order. Costs
        milliseconds, and a weight's memory.
        """
        if N < 1 or K < 1:
            return None
        w_NK, inputs = _trial(N, K)
        expected = [functional.linear(x_1K, w_NK) for x_1K in inputs]
        for k_block in dict.fromkeys(k if k < K else _even(K) for k in (*_LIKELY_K_BLOCKS, K)):
            if all(
                torch.equal(self.run([w_NK], x_1K, k_block), y_1N)
                for x_1K, y_1N in zip(inputs, expected, strict=True)
            ):
                return k_block
        return None


def _trial(N: int, K: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A weight, and inputs that tell orders of summation, and ways with tiny numbers, apart."""
    generator = torch.Generator().manual_seed(0)
    half = K // 2
    order = torch.randperm(half, generator=generator)
    w_rK = torch.randn(min(N, _TRIAL_ROWS), K, generator=generator).bfloat16()
    w_rK[:, half : 2 * half] = w_rK[:, order]
    w_NK = w_rK.repeat(math.ceil(N / len(w_rK)), 1)[:N]
    inputs = []
    for _ in range(min(max(2, _TRIAL_OUTPUTS // N), _MAX_TRIAL_INPUTS)):
        x_1K = torch.randn(1, K, generator=generator).bfloat16()
        x_1K[:, half : 2 * half] = -x_1K[:, order]
        x_1K[:, 2 * half :] = 0
        inputs.append(x_1K)
    plain_1K = torch.randn(1, K, generator=generator)
    inputs += [plain_1K.bfloat16(), (plain_1K * 2.0**-128).bfloat16()]
    return w_NK, inputs


def _even(K: int) -> int:
    return K + K % 2


def _checked_shape(
    weights: list[torch.Tensor], x_kK: torch.Tensor, k_block: int
) -> tuple[int, int]:
    """(N, K), or ValueError: a wrong shape would read memory that is not the tensors'."""
    if not weights:
        raise ValueError("weights is empty: pass at least one [N, K] tensor")
    shape = weights[0].shape
    for w in weights:
        if w.shape != shape or w.dim() != 2 or not _is_plain(w):
            raise ValueError(
                f"weights must be contiguous bf16 CPU tensors of one shape [N, K], got "
                f"{tuple(w.shape)} {w.dtype} on {w.device} with strides {w.stride()}"
            )
    N, K = shape
    if x_kK.dim() != 2 or x_kK.shape[1] != K or not _is_plain(x_kK):
        raise ValueError(
            f"x must be a contiguous bf16 CPU tensor with {K} columns, got "
            f"{tuple(x_kK.shape)} {x_kK.dtype} on {x_kK.device} with strides {x_kK.stride()}"
        )
    if x_kK.shape[0] not in (1, len(weights)):
        raise ValueError(
            f"x has {x_kK.shape[0]} rows for {len(weights)} weights: pass one row, or one each"
        )
    if k_block < 2 or k_block % 2:
        raise ValueError(f"k_block must be even and positive, got {k_block}: ask find_k_block")
    return N, K


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu and tensor.is_contiguous()
