"""Rates at which memory is read and copied, by all threads, over more bytes than caches hold."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from moe_runtime.errors import ProbeError
from moe_runtime.expert_memory import format_bytes
from moe_runtime.memory.available import available_memory_bytes

_LEAST_BYTES = 64 * 2**20
_USUAL_BYTES = 512 * 2**20
_BYTES_PER_THREAD = 64 * 2**20  # many cores have much cache
_SHARE_OF_AVAILABLE = 8
_CHUNKS_PER_THREAD = 8  # a thread that is held up leaves its share to the others
_NOISE_BYTES = 2**20


class MemoryRate(Protocol):
    """How fast one device reads and copies its memory, and `pool`: bytes there to work on.

    The bytes of `pool` (1-D uint8) are sound numbers as float32, bfloat16 and float16. Every call
    is a sample of its own; `reads_gbps` and `copies_gbps` keep them.
    """

    pool: torch.Tensor
    reads_gbps: list[float]
    copies_gbps: list[float]

    def read_gbps(self) -> float: ...

    def copy_gbps(self) -> float: ...


class CpuMemoryRate:
    """Memory of the CPU, read by numpy in threads of its own. A context manager."""

    def __init__(self, *, num_threads: int, num_bytes: int) -> None:
        num_bytes -= num_bytes % _NOISE_BYTES
        self.reads_gbps: list[float] = []
        self.copies_gbps: list[float] = []
        self._threads = ThreadPoolExecutor(num_threads)
        # numpy asks for huge pages, as the runtime does for its slots.
        source = np.empty(num_bytes, dtype=np.uint8)
        target = np.ones(num_bytes, dtype=np.uint8)  # written, so that its pages are there
        self._chunks = np.array_split(source.view(np.int64), num_threads * _CHUNKS_PER_THREAD)
        self._targets = np.array_split(target.view(np.int64), num_threads * _CHUNKS_PER_THREAD)
        self._num_bytes = num_bytes
        self.pool = torch.from_numpy(source)
        self.pool.view(-1, _NOISE_BYTES).copy_(sound_noise(_NOISE_BYTES))

    def read_gbps(self) -> float:
        """GB/s of an `or` over all bytes: of numpy's reductions the one that waits least."""
        rate = self._timed(np.bitwise_or.reduce, self._chunks)
        self.reads_gbps.append(rate)
        return rate

    def copy_gbps(self) -> float:
        """GB copied a second; each of them is read once and written once."""
        rate = self._timed(np.copyto, self._targets, self._chunks)
        self.copies_gbps.append(rate)
        return rate

    def _timed(self, work: Callable[..., Any], *arguments: list[Any]) -> float:
        start = time.perf_counter()
        for _ in self._threads.map(work, *arguments):
            pass
        return self._num_bytes / (time.perf_counter() - start) / 1e9

    def __enter__(self) -> "CpuMemoryRate":
        return self

    def __exit__(self, *failure: object) -> None:
        self._threads.shutdown()


def pool_bytes(num_threads: int) -> int:
    """How much to read and copy here: far beyond caches, and little of what is free."""
    available = available_memory_bytes()
    wanted = max(_USUAL_BYTES, num_threads * _BYTES_PER_THREAD)
    num_bytes = min(wanted, available // _SHARE_OF_AVAILABLE)
    if num_bytes < _LEAST_BYTES:
        raise ProbeError(
            f"{format_bytes(available)} of memory are available and the probe needs "
            f"{format_bytes(_LEAST_BYTES * _SHARE_OF_AVAILABLE)}; end other programs"
        )
    return num_bytes


def sound_noise(num_bytes: int) -> torch.Tensor:
    """`[num_bytes]` uint8, the same each time: numbers of size 0.5 to 2 in the float dtypes.

    They are bfloat16 numbers; two of them are a float32 of that size, and one read as float16 lies
    between 1.7 and 2. Tiny numbers, infinities and NaN would be computed at another speed.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(num_bytes // 2, generator=generator) * 1.4 + 0.5
    signs = torch.randint(0, 2, (num_bytes // 2,), generator=generator) * 2 - 1
    return (sizes * signs).bfloat16().view(torch.uint8)
