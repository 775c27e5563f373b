"""Host memory in one mapping of its own, in huge pages where the kernel grants them."""

import mmap
from typing import Any

import numpy as np

Blob = np.ndarray[Any, np.dtype[np.uint8]]

_HUGE_PAGE_BYTES = 2 * 2**20


def anonymous_memory(num_bytes: int) -> Blob:
    """Zeros on whole pages, which the system hands out as they are touched.

    Huge pages give a disk few long pieces of memory to fill instead of many short ones, which
    doubles the rate of a virtio disk, and a kernel that reads weights fewer pages to look up.
    """
    if num_bytes < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    # Private, as Linux gives shared mappings, which are Python's default, small pages only; and
    # with room to start on a border.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=flags)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without huge pages: only slower
        pass
    memory: Blob = np.frombuffer(mapping, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE_BYTES
    return memory[start : start + num_bytes]
