"""Which kind of file system an open file lies on."""

import os
from pathlib import Path

UNKNOWN = "unknown"
_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/self/mountinfo")


def file_system_of(descriptor: int) -> str:
    """`ext4`, `tmpfs` ..., or UNKNOWN: not Linux, or a file system whose files name no mount."""
    device = os.fstat(descriptor).st_dev
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return UNKNOWN
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return after.split()[0]
    return UNKNOWN


def is_in_memory(file_system: str) -> bool:
    """Whether its files lie in memory and nowhere else, whatever is said to the page cache."""
    return file_system in _IN_MEMORY
