"""Bytes that this process had the system fetch from disks."""

from pathlib import Path

_IO = Path("/proc/self/io")


def read_from_disk_bytes() -> int | None:
    """Since the process started, without what the page cache had; None where no one counts."""
    try:
        lines = _IO.read_text().splitlines()
    except OSError:  # not Linux, or not allowed
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    return None
