"""How fast a checkpoint's files are read at random places, past the page cache."""

import mmap
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

_PAGE_BYTES = 4096


class RandomReads:
    """Reads blocks anywhere in `files` with O_DIRECT, as misses of a cache do.

    Reading one file from end to end would flatter the disk: its host may still hold what was read
    a moment ago. A context manager; raises OSError where the file system refuses O_DIRECT.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._descriptors = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files]
        self._sizes = [os.fstat(descriptor).st_size for descriptor in self._descriptors]
        self._random = random.Random(0)

    def rate_gbps(self, *, block_bytes: int, num_threads: int, seconds: float) -> float:
        """GB/s over about `seconds` with `num_threads` blocks under way at any time."""
        start = time.perf_counter()

        def read(seed: int) -> int:
            rng, total = random.Random(seed), 0
            with mmap.mmap(-1, block_bytes) as buffer:
                while time.perf_counter() - start < seconds:
                    file = rng.choices(range(len(self._sizes)), self._sizes)[0]
                    last_page = (self._sizes[file] - block_bytes) // _PAGE_BYTES
                    offset = rng.randint(0, max(last_page, 0)) * _PAGE_BYTES
                    total += os.preadv(self._descriptors[file], [buffer], offset)
            return total

        seeds = [self._random.getrandbits(32) for _ in range(num_threads)]
        with ThreadPoolExecutor(num_threads) as pool:
            num_bytes = sum(pool.map(read, seeds))
        return num_bytes / (time.perf_counter() - start) / 1e9

    def __enter__(self) -> "RandomReads":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
