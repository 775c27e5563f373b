"""Host memory in one mapping of its own, in huge pages where the kernel grants them."""

import mmap

import numpy as np

from moe_runtime.memory.disk import Blob


def anonymous_memory(num_bytes: int) -> Blob:
    """Zeros on whole pages, which the system hands out as they are touched."""
    mapping = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without huge pages: only slower
            pass
    memory: Blob = np.frombuffer(mapping, np.uint8)
    return memory
