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
from moe_runtime.kernels.cpu.matrix import Matrix
from moe_runtime.kernels.cpu.openmp import find_openmp

# T tokens, D model dim, F ffn dim, U rows of the up matrix (2F with a gate, else F),
# R rows: (token, expert) pairs sorted by expert, N outputs and K inputs of a linear layer

# A matrix as it is, or one whose rows are packed or quantised.
Weight = torch.Tensor | Matrix
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
            "level", "dtype", "gate", "is_interleaved", "is_in_parts", "stages",
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

    def layer(
        self,
        *,
        dim: int,
        ffn: int,
        num_up: int,
        gate: Gate | TorchGate,
        is_interleaved: bool = False,
    ) -> "CpuLayer":
        """A layer whose experts have up matrices `[num_up, dim]` and down matrices `[dim, ffn]`.

        A `gate` that is no `Gate` is called with `[n, num_up]` in the kernel's dtype and returns
        `[n, ffn]`. `is_interleaved`: rows of gate and up take turns.
        """
        return CpuLayer(self, dim, ffn, num_up, gate, is_interleaved)


class CpuLayer:
    """The shapes of one layer, from which steps begin."""

    def __init__(
        self,
        kernel: CpuExperts,
        dim: int,
        ffn: int,
        num_up: int,
        gate: Gate | TorchGate,
        is_interleaved: bool,
    ) -> None:
        self.kernel = kernel
        self.up_shape, self.down_shape = (num_up, dim), (dim, ffn)
        self.torch_gate = None if isinstance(gate, Gate) else gate
        self.template = kernel.operation(
            dim=dim,
            ffn=ffn,
            up_rows=num_up,
            gate=gate if isinstance(gate, Gate) else Gate.NONE,
            is_interleaved=is_interleaved,
        )

    def begin(
        self, x_TD: torch.Tensor, token_R: torch.Tensor, weight_R: torch.Tensor
    ) -> "ExpertsStep":
        """Begin work on `x_TD`, whose row `token_R[r]` goes to the expert of row r.

        `token_R` int64 below T and `weight_R` float32 `[R]`, contiguous on the CPU as `x_TD`.
        """
        return ExpertsStep(self, x_TD, token_R, weight_R)


class ExpertsStep:
    """One layer's rows under way: `run` or `put` each expert once, in any order, then `sum`."""

    def __init__(
        self,
        layer: CpuLayer,
        x_TD: torch.Tensor,
        token_R: torch.Tensor,
        weight_R: torch.Tensor,
    ) -> None:
        dtype = layer.kernel.dtype
        (num_up, dim), ffn = layer.up_shape, layer.down_shape[1]
        num_rows = token_R.shape[0]
        _check("x", x_TD, dtype, (x_TD.shape[0], dim))
        _check("token", token_R, torch.int64, (num_rows,))
        _check("weight", weight_R, torch.float32, (num_rows,))
        num_tokens = x_TD.shape[0]
        self._layer = layer
        self._inputs = (x_TD, token_R, weight_R)
        # One allocation for all: up_y, y and the sums in float32, then h in the layer's dtype.
        sizes = (num_rows * num_up, num_rows * dim, num_tokens * dim, num_rows * ffn)
        self._sizes = sizes
        self._scratch = torch.empty(sum(sizes))
        begin = self._scratch.data_ptr()
        operation = self._operation = Operation.from_buffer_copy(layer.template)
        operation.x = x_TD.data_ptr()
        operation.token = token_R.data_ptr()
        operation.weight = weight_R.data_ptr()
        operation.up_y = begin
        operation.y = begin + 4 * sizes[0]
        operation.total = begin + 4 * (sizes[0] + sizes[1])
        operation.h = begin + 4 * (sizes[0] + sizes[1] + sizes[2])
        operation.num_all_rows = num_rows
        operation.num_tokens = num_tokens

    def run(
        self,
        up: Sequence[Weight],
        down: Sequence[Weight],
        rows: Sequence[tuple[int, int]],
        *,
        is_last: bool,
    ) -> torch.Tensor | None:
        """Compute experts: `up[i] [U, D]` and `down[i] [D, F]` for the rows `rows[i]` (begin, end).

        Tensors are contiguous, at any address; matrices have as many rows and columns, and packed
        ones give the bits of tensors. All of a call are the one or the other, and are read once.
        With `is_last` every other row must be there, and the result is that of `sum`.
        """
        assert len(up) == len(down) == len(rows)
        layer = self._layer
        num_experts = len(rows)
        pointers, counts = ctypes.c_void_p * num_experts, ctypes.c_int64 * num_experts
        up_pointers = pointers(*_addresses("up", up, layer.kernel.dtype, layer.up_shape))
        down_pointers = pointers(*_addresses("down", down, layer.kernel.dtype, layer.down_shape))
        first_rows = counts(*[begin for begin, _ in rows])
        num_rows = counts(*[end - begin for begin, end in rows])
        operation = self._operation
        operation.up = ctypes.addressof(up_pointers)
        operation.down = ctypes.addressof(down_pointers)
        operation.first_row = ctypes.addressof(first_rows)
        operation.num_rows = ctypes.addressof(num_rows)
        operation.num_experts = num_experts
        operation.is_in_parts = isinstance(up[0], Matrix) if up else False
        assert all(isinstance(w, Matrix) == bool(operation.is_in_parts) for w in (*up, *down))
        stages = Stage.UP | Stage.GATE | Stage.DOWN
        if layer.torch_gate is not None:
            self._call(Stage.UP)
            self._gate_in_torch(layer.torch_gate, rows)
            stages = Stage.DOWN
        if is_last:
            return self._call_sum(stages)
        self._call(stages)
        return None

    def put(self, begin: int, y_nD: torch.Tensor) -> None:
        """The rows from `begin` on, computed elsewhere; not weighted."""
        self._part(1).view(-1, y_nD.shape[1])[begin : begin + len(y_nD)] = y_nD

    def sum(self) -> torch.Tensor:
        """`out[t]`: the weighted rows of token t, added up in the order of rows; `[T, D]`."""
        self._operation.num_experts = 0
        return self._call_sum(Stage(0))

    def _gate_in_torch(self, gate: TorchGate, rows: Sequence[tuple[int, int]]) -> None:
        num_up, ffn = self._layer.up_shape[0], self._layer.down_shape[1]
        dtype = self._layer.kernel.dtype
        up_y_RU = self._part(0).view(-1, num_up)
        h_RF = self._part(3).view(dtype)[: len(up_y_RU) * ffn].view(-1, ffn)
        for begin, end in rows:
            if begin < end:
                h_RF[begin:end] = gate(up_y_RU[begin:end].to(dtype))

    def _part(self, number: int) -> torch.Tensor:
        """One of the four parts of the scratch memory."""
        begin = sum(self._sizes[:number])
        return self._scratch[begin : begin + self._sizes[number]]

    def _call_sum(self, stages: Stage) -> torch.Tensor:
        out_TD = torch.empty_like(self._inputs[0])
        self._operation.out = out_TD.data_ptr()
        self._call(stages | Stage.SUM)
        return out_TD

    def _call(self, stages: Stage) -> None:
        operation = self._operation
        operation.stages, operation.next_up, operation.next_down = stages, 0, 0
        self._layer.kernel.call(operation)


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


def _addresses(
    name: str, weights: Sequence[Weight], dtype: torch.dtype, shape: tuple[int, int]
) -> list[int]:
    for w in weights:
        if not isinstance(w, Matrix):
            _check(name, w, dtype, shape)
        elif w.shape != shape or dtype is not torch.bfloat16:
            raise ValueError(
                f"{name} must be a bfloat16 matrix {list(shape)}, got {list(w.shape)} for {dtype}"
            )
    return [w.address if isinstance(w, Matrix) else w.data_ptr() for w in weights]


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a tensor with which the library would read what is not its own."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu:
        return
    raise ValueError(
        f"{name} must be a contiguous {dtype} CPU tensor {list(shape)}, got {list(tensor.shape)} "
        f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
    )
