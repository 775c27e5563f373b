"""Resident memory of this process: now, and the most it ever was."""

import sys
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """What is resident now."""
    found = _status_bytes("VmRSS")
    return int(psutil.Process().memory_info().rss) if found is None else found


def peak_resident_bytes() -> int:
    """The most that was resident since the process started."""
    found = _status_bytes("VmHWM")
    return _peak_of_rusage() if found is None else found


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file or field."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _peak_of_rusage() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
