"""The processor of this machine: its name, its cores, its vector instructions."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

# What decides which code computes, as /proc/cpuinfo spells it.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """`flags` are those of CPU_FLAGS that are there; `is_listed`: the system lists flags at all."""

    model: str
    flags: tuple[str, ...]
    is_listed: bool
    usable_cores: int  # in this process's affinity mask
    physical_cores: int  # of them, at most: two threads of one core share its arithmetic


def this_processor() -> Processor:
    """What the operating system says of it."""
    try:
        text = _CPUINFO.read_text()
    except OSError:  # not Linux
        text = ""
    present = set(_field(text, "flags").split())
    usable = _num_usable_cores()
    return Processor(
        model=_field(text, "model name") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in CPU_FLAGS if flag in present),
        is_listed=bool(present),
        usable_cores=usable,
        physical_cores=min(usable, psutil.cpu_count(logical=False) or usable),
    )


def _num_usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return match.group(1).strip() if match else ""
