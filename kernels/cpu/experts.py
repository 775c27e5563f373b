"""The experts of one layer for a few tokens, by the C library beside this file."""

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum, IntFlag
from typing import Any

import torch

from moe_runtime.kernels.cpu.experts_status import (
    DTYPES,
    LEVELS,
    best_level,
    experts_status,
    open_experts_library,
)
from moe_runtime.kernels.cpu.openmp import find_openmp

# T tokens, D model dim, F ffn dim, U rows of the up matrix (2F with a gate, else F),
# R rows: (token, expert) pairs sorted by expert, N outputs and K inputs of a linear layer

TorchGate = Callable[[torch.Tensor], torch.Tensor]


class Gate(IntEnum):
    """Activations that the library computes, as `enum gate` numbers them.

    With U = 2F the activation of one half is multiplied with the other; with U = F it is all.
    """

    NONE = 0
    SILU = 1
    GELU_TANH = 2
    RELU = 3
    RELU_SQUARED = 4


class Stage(IntFlag):
    """Parts of a call, as `enum stage` numbers them."""

    UP = 1
    GATE = 2
    DOWN = 4
    SUM = 8


class Operation(ctypes.Structure):
    """`struct moe_experts`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "up", "down", "first_row", "num_rows", "token", "weight", "x", "up_y", "h", "y",
            "total", "out", "openmp",
        )),
        *((name, ctypes.c_int64) for name in (
            "num_experts", "num_all_rows", "num_tokens", "dim", "ffn", "up_rows", "next_up",
            "next_down",
        )),
        *((name, ctypes.c_int32) for name in (
            "level", "dtype", "gate", "is_interleaved", "stages",
        )),
    )  # fmt: skip


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

    def step(
        self,
        x_TD: torch.Tensor,
        token_R: torch.Tensor | None,
        weight_R: torch.Tensor | None,
        *,
        num_up: int,
        ffn: int,
        gate: Gate | TorchGate,
        is_interleaved: bool = False,
    ) -> "ExpertsStep":
        """Begin one layer's work on `x_TD`, whose row `token_R[r]` goes to the expert of row r.

        `token_R` int64 and `weight_R` float32 `[R]`; None is one row a token, unweighted. A `gate`
        that is no `Gate` is called with `[n, U]` in the kernel's dtype and returns `[n, F]`.
        """
        return ExpertsStep(self, x_TD, token_R, weight_R, num_up, ffn, gate, is_interleaved)


class ExpertsStep:
    """One layer's rows under way: `run` or `put` each expert once, in any order, then `sum`."""

    def __init__(
        self,
        kernel: CpuExperts,
        x_TD: torch.Tensor,
        token_R: torch.Tensor | None,
        weight_R: torch.Tensor | None,
        num_up: int,
        ffn: int,
        gate: Gate | TorchGate,
        is_interleaved: bool,
    ) -> None:
        _check(x_TD, "x", kernel.dtype, (None, None))
        num_tokens, dim = x_TD.shape
        num_rows = num_tokens if token_R is None else len(token_R)
        for tensor, name, dtype in (
            (token_R, "token", torch.int64),
            (weight_R, "weight", torch.float32),
        ):
            if tensor is not None:
                _check(tensor, name, dtype, (num_rows,))
        self._kernel = kernel
        self._gate = gate
        self._x_TD = x_TD
        self._rows = (token_R, weight_R)
        self._up_y_RU = torch.empty(num_rows, num_up)
        self._h_RF = torch.empty(num_rows, ffn, dtype=kernel.dtype)
        self._y_RD: torch.Tensor | None = None
        self._operation = kernel.operation(
            token=None if token_R is None else token_R.data_ptr(),
            weight=None if weight_R is None else weight_R.data_ptr(),
            x=x_TD.data_ptr(),
            up_y=self._up_y_RU.data_ptr(),
            h=self._h_RF.data_ptr(),
            num_all_rows=num_rows,
            num_tokens=num_tokens,
            dim=dim,
            ffn=ffn,
            up_rows=num_up,
            gate=gate if isinstance(gate, Gate) else Gate.NONE,
            is_interleaved=is_interleaved,
        )

    def check(self, up: Sequence[torch.Tensor], down: Sequence[torch.Tensor]) -> None:
        """Raise ValueError unless these are the matrices of experts: the library trusts them."""
        operation, dtype = self._operation, self._kernel.dtype
        for name, weights, shape in (
            ("up", up, (operation.up_rows, operation.dim)),
            ("down", down, (operation.dim, operation.ffn)),
        ):
            for w in weights:
                if not (w.dtype is dtype and w.shape == shape and w.is_contiguous() and w.is_cpu):
                    raise _wrong(name, w, dtype, shape)

    def run(
        self,
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        rows: Sequence[tuple[int, int]],
        *,
        is_last: bool,
    ) -> torch.Tensor | None:
        """Compute experts: `up[i] [U, D]` and `down[i] [D, F]` for the rows `rows[i]` (begin, end).

        Weights are contiguous, at any address, and are read once. With `is_last` every other row
        must be there, and the result is that of `sum`.
        """
        assert len(up) == len(down) == len(rows)
        self.check(up, down)
        self._set_experts([w.data_ptr() for w in up], [w.data_ptr() for w in down], rows)
        return self._finish(is_last)

    def put(self, begin: int, y_nD: torch.Tensor) -> None:
        """The rows from `begin` on, computed elsewhere; not weighted."""
        self._outputs()[begin : begin + len(y_nD)] = y_nD

    def sum(self) -> torch.Tensor:
        """`out[t]`: the weighted rows of token t, added up in the order of rows; `[T, D]`."""
        self._set_experts([], [], [])
        self._outputs()
        return self._call_sum(Stage(0))

    def _finish(self, is_last: bool) -> torch.Tensor | None:
        self._outputs()
        if isinstance(self._gate, Gate):
            stages = Stage.UP | Stage.GATE | Stage.DOWN
        else:
            self._call(Stage.UP)
            for begin, end in self._spans:
                up_y_nU = self._up_y_RU[begin:end].to(self._kernel.dtype)
                self._h_RF[begin:end] = self._gate(up_y_nU)
            stages = Stage.DOWN
        if is_last:
            return self._call_sum(stages)
        self._call(stages)
        return None

    def _set_experts(
        self, up: Sequence[int], down: Sequence[int], rows: Sequence[tuple[int, int]]
    ) -> None:
        num_experts = len(rows)
        pointers = ctypes.c_void_p * num_experts
        counts = ctypes.c_int64 * num_experts
        # Kept until the next call: the operation holds only their addresses.
        self._held = (
            pointers(*up),
            pointers(*down),
            counts(*(begin for begin, _ in rows)),
            counts(*(end - begin for begin, end in rows)),
        )
        self._spans = rows
        operation = self._operation
        up_pointers, down_pointers, first_rows, num_rows = self._held
        operation.up = ctypes.addressof(up_pointers)
        operation.down = ctypes.addressof(down_pointers)
        operation.first_row = ctypes.addressof(first_rows)
        operation.num_rows = ctypes.addressof(num_rows)
        operation.num_experts = num_experts

    def _outputs(self) -> torch.Tensor:
        if self._y_RD is None:
            self._y_RD = torch.empty(self._operation.num_all_rows, self._operation.dim)
            self._operation.y = self._y_RD.data_ptr()
        return self._y_RD

    def _call_sum(self, stages: Stage) -> torch.Tensor:
        out_TD = torch.empty_like(self._x_TD)
        total_TD = torch.empty(out_TD.shape)
        self._operation.out, self._operation.total = out_TD.data_ptr(), total_TD.data_ptr()
        self._call(stages | Stage.SUM)
        return out_TD

    def _call(self, stages: Stage) -> None:
        operation = self._operation
        operation.stages, operation.next_up, operation.next_down = stages, 0, 0
        self._kernel.call(operation)


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


def _check(
    tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """Raise ValueError for a tensor with which the library would read what is not its own."""
    is_shaped = tensor.dim() == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, tensor.shape, strict=True)
    )
    if not (is_shaped and tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()):
        raise _wrong(name, tensor, dtype, shape)


def _wrong(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> ValueError:
    wanted = ", ".join("any" if length is None else str(length) for length in shape)
    return ValueError(
        f"{name} must be a contiguous {dtype} CPU tensor [{wanted}], got {tuple(tensor.shape)} "
        f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
    )
