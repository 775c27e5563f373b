"""Packs and unpacks blocks of bf16 weights by the C library beside this file."""

import ctypes
from collections.abc import Sequence

import torch

from moe_runtime.kernels.cpu.openmp import find_openmp
from moe_runtime.kernels.cpu.unpack_status import LEVELS, open_unpack_library, unpack_status
from moe_runtime.kernels.packed_blocks import (
    HEADER_BYTES,
    BlockCodec,
    BlockTask,
    TorchCodec,
    index_entries,
    row_bytes,
)

# N rows and K columns of a block


class _Block(ctypes.Structure):
    """`struct moe_block`."""

    _fields_ = (
        ("block", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("identity", ctypes.c_uint64),
        ("status", ctypes.c_int64),
    )


class _Unpack(ctypes.Structure):
    """`struct moe_unpack`."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("level", ctypes.c_int64),
        ("stream", ctypes.c_int64),
        ("is_known", ctypes.c_int64),
        ("openmp", ctypes.c_void_p),
    )


class CpuCodec:
    """`BlockCodec` at the rate of the memory. Calls release the GIL."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self.level = level
        self._pack, self._seal = library.moe_pack, library.moe_seal
        self._checksum, self._run = library.moe_checksum, library.moe_unpack_run
        self._pack.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        )
        self._pack.restype = ctypes.c_int64
        self._seal.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int64)
        self._seal.restype = None
        self._checksum.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._checksum.restype = ctypes.c_uint64
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._run.restype = None
        self._openmp = find_openmp()

    def pack(self, weights_NK: torch.Tensor) -> torch.Tensor:
        N, K = weights_NK.shape
        if weights_NK.dtype.itemsize != 2 or not weights_NK.is_cpu:
            raise ValueError(
                f"weights must have 2 bytes each and lie on the CPU, got {weights_NK.dtype} on "
                f"{weights_NK.device}"
            )
        source = weights_NK.contiguous()
        # With every weight escaped, and one byte that is written before it is known to be needed.
        room = HEADER_BYTES + N * row_bytes(K) + 4 * index_entries(N, K) + N * K + 1
        block = torch.empty(room, dtype=torch.uint8)
        num_bytes = self._pack(source.data_ptr(), N, K, block.data_ptr())
        return block[:num_bytes].clone()

    def seal(self, block: torch.Tensor, identity: int) -> None:
        self._seal(_address(block), block.numel(), identity, self.level)

    def checksum(self, data: torch.Tensor) -> int:
        return int(self._checksum(_address(data), data.numel(), self.level))

    def run(
        self,
        tasks: Sequence[BlockTask],
        *,
        num_threads: int = 1,
        stream: bool = False,
        is_known: bool = False,
    ) -> list[int]:
        blocks = (_Block * len(tasks))(*[_block(task) for task in tasks])
        operation = _Unpack(
            ctypes.addressof(blocks),
            len(tasks),
            self.level,
            stream,
            is_known,
            None if self._openmp is None else ctypes.addressof(self._openmp),
        )
        self._run(ctypes.addressof(operation), num_threads)
        return [block.status for block in blocks]


def load_codec(level: str | None = None) -> BlockCodec:
    """The fastest codec here. `level` asks for "torch", "c", "avx2" or "avx512".

    Raises ValueError for a level that this CPU lacks, or that needs a library which was not built.
    """
    library = open_unpack_library()
    if level == "torch" or (level is None and isinstance(library, str)):
        return TorchCodec()
    levels = () if isinstance(library, str) else LEVELS[: library.moe_unpack_levels() + 1]
    if isinstance(library, str) or (level is not None and level not in levels):
        raise ValueError(
            f"level {level!r} is not available here: {unpack_status()}; "
            f"choose from {', '.join(('torch', *levels))}"
        )
    return CpuCodec(library, LEVELS.index(level or levels[-1]))


def _block(task: BlockTask) -> _Block:
    """The task as C sees it, or ValueError: a wrong size would touch memory that is not its own."""
    weights = task.weights
    if weights is not None and (
        weights.nbytes != 2 * task.N * task.K or not weights.is_contiguous() or not weights.is_cpu
    ):
        raise ValueError(
            f"weights must be {2 * task.N * task.K} contiguous bytes on the CPU for a block of "
            f"{task.N} x {task.K}, got {weights.nbytes} on {weights.device}"
        )
    return _Block(
        _address(task.block),
        task.block.numel(),
        None if weights is None else weights.data_ptr(),
        task.N,
        task.K,
        task.identity,
        0,
    )


def _address(data: torch.Tensor) -> int:
    if data.dtype != torch.uint8 or not data.is_contiguous() or not data.is_cpu:
        raise ValueError(
            f"packed data must be contiguous uint8 on the CPU, got {data.dtype} on {data.device} "
            f"with strides {data.stride()}"
        )
    return data.data_ptr()
