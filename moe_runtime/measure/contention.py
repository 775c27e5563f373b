"""How much disk and processor slow each other down when both are at work."""

import math
import statistics
import threading
import time
from dataclasses import dataclass

import torch
from torch.nn import functional

from moe_runtime.measure.random_read import RandomReads
from moe_runtime.memory.disk import CHUNK_BYTES, NUM_THREADS
from moe_runtime.perf.hardware import BesideCompute

_SECONDS = 0.25  # of each of the three
_MATRIX_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class _Rates:
    compute: float
    read: float


class Contention:
    """Rounds of computing alone, reading alone and both.

    Alone the disk reads as for a demand, many pieces at a time; beside compute as ahead of need,
    one after the other.

    Where the disk is virtual, its host copies every block in the memory and with the processors
    that compute, and two lanes that a simulation keeps apart are not apart.
    """

    def __init__(self, pool: torch.Tensor, reads: RandomReads) -> None:
        """`pool`: more bytes than caches hold, sound numbers as bfloat16."""
        width = math.isqrt(_MATRIX_BYTES // 2)
        num = len(pool) // _MATRIX_BYTES
        self._weights = pool[: num * _MATRIX_BYTES].view(torch.bfloat16).view(num, width, width)
        self._x = self._weights[0, :1]
        self._reads = reads
        self._compute_shares: list[float] = []
        self._read_shares: list[float] = []
        self._read_gbps: list[float] = []  # beside compute

    def sample(self) -> None:
        """One round."""
        compute = self._computed_until(time.perf_counter() + _SECONDS)
        read = self._reads.rate_gbps(
            block_bytes=CHUNK_BYTES, num_threads=NUM_THREADS, seconds=_SECONDS
        )
        both = self._both()
        self._compute_shares.append(both.compute / compute)
        self._read_shares.append(both.read / read)
        self._read_gbps.append(both.read)

    @property
    def read_gbps(self) -> float:
        """Of one read after the other beside compute, the median over the rounds."""
        return statistics.median(self._read_gbps)

    def result(self) -> BesideCompute:
        """Medians over the rounds; nothing is said to be faster in company."""
        return BesideCompute(
            read_share=round(min(1.0, statistics.median(self._read_shares)), 3),
            compute_share=round(min(1.0, statistics.median(self._compute_shares)), 3),
        )

    def samples(self) -> dict[str, list[float]]:
        """Every sample in its order, by a name that says what it is of."""
        return {
            "disk read beside compute, share of alone": self._read_shares,
            "compute beside disk read, share of alone": self._compute_shares,
        }

    def _both(self) -> _Rates:
        read: list[float] = []

        def work() -> None:
            read.append(
                self._reads.rate_gbps(block_bytes=CHUNK_BYTES, num_threads=1, seconds=_SECONDS)
            )

        reader = threading.Thread(target=work)
        until = time.perf_counter() + _SECONDS
        reader.start()
        try:
            compute = self._computed_until(until)
        finally:
            reader.join()
        return _Rates(compute, read[0])

    def _computed_until(self, end: float) -> float:
        """Products a second of one row and a matrix, as a layer has them for one token."""
        start, count = time.perf_counter(), 0
        while time.perf_counter() < end or not count:
            functional.linear(self._x, self._weights[count % len(self._weights)])
            count += 1
        return count / (time.perf_counter() - start)
