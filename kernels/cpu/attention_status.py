"""Finds the compiled library of `attention.c`, or why torch has to do; needs no torch."""

import ctypes
from pathlib import Path

from moe_runtime.kernels.cpu.library import open_library

_INTERFACE = 2  # the number in attention.c that changes with a signature or a struct

PAGE_TOKENS = 32  # attention.c holds the scores of a page in two vectors
LEVELS = ("c", "avx2", "avx512", "avx512bf16")  # by the number that attention.c gives them


def attention_status() -> str:
    """What computes decode attention over pages on this machine, and why."""
    found = open_attention_library()
    return found if isinstance(found, str) else f"{LEVELS[found.moe_attention_levels()]} attention"


def open_attention_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    """The library in `folder`, or the status that says why it cannot be used."""
    return open_library(folder, "attention", _INTERFACE)
