"""The experts of one layer for a few tokens, by the C library beside this file."""

import ctypes
from typing import Any

import torch

from moe_runtime.kernels.cpu.experts_layer import CpuLayer
from moe_runtime.kernels.cpu.experts_status import (
    DTYPES,
    LEVELS,
    best_level,
    experts_status,
    open_experts_library,
)
from moe_runtime.kernels.cpu.openmp import find_openmp
from moe_runtime.kernels.cpu.operation import KernelGate, Operation, TorchGate

# D model dim, F ffn dim


class CpuExperts:
    """Computes experts at the rate at which their weights can be read.

    Sums are float32 and are rounded where the model's dtype has to hold them: the gated numbers and
    the layer's output, each once. A row's bits depend on nothing but its token, its expert and
    `level`: not on the other rows, on the number of threads, or on how experts share calls.
    Calls run on torch's own OpenMP threads and release the GIL.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, level: str) -> None:
        self.dtype = dtype
        self.level = level
        self._run = library.moe_experts_run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._run.restype = None
        self._read = library.moe_experts_read
        self._read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
        self._read.restype = ctypes.c_uint64
        self._openmp = find_openmp()

    @classmethod
    def load(cls, dtype: torch.dtype, *, level: str | None = None) -> "CpuExperts | None":
        """The kernel for `dtype`, or None where `status` says why torch has to do.

        `level`, of `LEVELS`, asks for these instructions and no better ones; None too if the CPU
        lacks them.
        """
        found = open_experts_library()
        name = _name(dtype)
        if isinstance(found, str) or name not in DTYPES:
            return None
        if level is None:
            level = best_level(found, name)
        elif not found.moe_experts_supports(LEVELS[level], DTYPES[name]):
            level = None
        return None if level is None else cls(found, dtype, level)

    @staticmethod
    def status(dtype: torch.dtype = torch.bfloat16) -> str:
        """What computes experts on this machine: avx512_bf16, avx512f, avx2, or torch and why."""
        return experts_status(_name(dtype))

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self.dtype, self.level)  # a model that holds one can be copied and pickled

    def operation(self, **fields: Any) -> Operation:
        """A call with these fields of `struct moe_experts`, for `call`."""
        operation = Operation(level=LEVELS[self.level], dtype=DTYPES[_name(self.dtype)], **fields)
        if self._openmp is not None:
            operation.openmp = ctypes.addressof(self._openmp)
        return operation

    def call(self, operation: Operation) -> None:
        """Run it on torch's threads; the caller answers for every address in it."""
        self._run(ctypes.addressof(operation), torch.get_num_threads())

    def read(self, pool: torch.Tensor) -> None:
        """Read all bytes of a contiguous CPU tensor, on the threads and in the pieces of `call`.

        As fast as this memory can be read: what the time of a step is measured against.
        """
        if not (pool.is_cpu and pool.is_contiguous()):
            raise ValueError(f"pool must be a contiguous CPU tensor, got strides {pool.stride()}")
        openmp = None if self._openmp is None else ctypes.addressof(self._openmp)
        self._read(pool.data_ptr(), pool.nbytes, openmp, torch.get_num_threads())

    def layer(
        self,
        *,
        dim: int,
        ffn: int,
        num_up: int,
        gate: KernelGate | TorchGate,
        is_interleaved: bool = False,
    ) -> "CpuLayer":
        """A layer whose experts have up matrices `[num_up, dim]` and down matrices `[dim, ffn]`.

        A `gate` of torch is called with `[n, num_up]` in the kernel's dtype and returns
        `[n, ffn]`. `is_interleaved`: rows of gate and up take turns.
        """
        return CpuLayer(
            self.operation(), self.call, self.dtype, dim, ffn, num_up, gate, is_interleaved
        )


def _load(dtype: torch.dtype, level: str) -> CpuExperts:
    """The kernel again, after a copy or in another process."""
    kernel = CpuExperts.load(dtype, level=level)
    if kernel is None:
        raise ValueError(
            f"this machine has no {level} for {dtype} ({CpuExperts.status(dtype)}); "
            "load the model here instead of unpickling it"
        )
    return kernel


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
