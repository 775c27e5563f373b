"""How fast files are read at random places, past the page cache."""

import mmap
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from moe_runtime.measure.file_system import file_system_of, is_in_memory
from moe_runtime.memory.anonymous_memory import anonymous_memory

_PAGE_BYTES = 4096
_LEAST_BYTES = 2 * 2**20  # of memory: a huge page


class RandomReads:
    """Reads blocks anywhere in `files`, as misses of a cache do: the larger a file, the more often.

    Reading one file from end to end would flatter the disk: its host may still hold what was read
    a moment ago. Where O_DIRECT is refused, `is_direct` is False and pages are dropped from the
    page cache before they are read. On a file system in memory nothing can be dropped: there
    `is_direct` is False too, and the rate is that of a copy. A context manager; raises OSError.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._descriptors: list[int] = []
        self._random = random.Random(0)
        self.is_direct = True
        try:
            for file in files:
                direct = _open_direct(file)
                self.is_direct = self.is_direct and direct is not None
                self._descriptors.append(os.open(file, os.O_RDONLY) if direct is None else direct)
        except BaseException:
            self.close()
            raise
        self._sizes = [os.fstat(descriptor).st_size for descriptor in self._descriptors]
        self.file_system = file_system_of(self._descriptors[0])

    def rate_gbps(self, *, block_bytes: int, num_threads: int, seconds: float) -> float:
        """GB/s over about `seconds` with `num_threads` blocks under way at any time."""
        num_bytes, elapsed = self.read_for(
            block_bytes=block_bytes, num_threads=num_threads, seconds=seconds
        )
        return num_bytes / elapsed / 1e9

    def read_for(self, *, block_bytes: int, num_threads: int, seconds: float) -> tuple[int, float]:
        """(bytes read, seconds taken): whole blocks, at least one a thread."""

        def read(buffer: memoryview, seed: int) -> int:
            rng, total = random.Random(seed), 0
            while total == 0 or time.perf_counter() - start < seconds:
                file = rng.choices(range(len(self._sizes)), self._sizes)[0]
                last_page = (self._sizes[file] - block_bytes) // _PAGE_BYTES
                offset = rng.randint(0, max(last_page, 0)) * _PAGE_BYTES
                total += self._read_block(self._descriptors[file], buffer, offset)
            return total

        seeds = [self._random.getrandbits(32) for _ in range(num_threads)]
        # As the runtime's slots: on pages, huge ones where there are some, which are there before
        # the clock runs.
        pages_bytes = -(-block_bytes // _PAGE_BYTES) * _PAGE_BYTES
        memory = anonymous_memory(max(num_threads * pages_bytes, _LEAST_BYTES))
        memory[::_PAGE_BYTES] = 1
        buffers = [memory[i * pages_bytes :][:block_bytes].data for i in range(num_threads)]
        with ThreadPoolExecutor(num_threads) as pool:
            start = time.perf_counter()
            num_bytes = sum(pool.map(read, buffers, seeds))
            return num_bytes, time.perf_counter() - start

    def _read_block(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        return os.preadv(descriptor, [buffer], offset)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> "RandomReads":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _open_direct(file: Path) -> int | None:
    """`file` opened past the page cache, tried with a real read; None where that is refused.

    A file system in memory may accept the flag, and has nothing else to read from.
    """
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, _PAGE_BYTES) as page:
            os.preadv(descriptor, [page], 0)
    except OSError:
        os.close(descriptor)
        return None
    if is_in_memory(file_system_of(descriptor)):
        os.close(descriptor)
        return None
    return descriptor
