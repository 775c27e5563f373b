"""Finds the compiled library of `dequant.c`, or the reason why torch has to do; needs no torch."""

import ctypes
from pathlib import Path

from moe_runtime.kernels.cpu.library import open_library

_INTERFACE = 1  # the number in dequant.c that changes with a signature or a struct

LEVELS = ("c", "avx2", "avx512")  # by the number that dequant.c gives them


def dequant_status() -> str:
    """What dequantises fp8 and mxfp4 weights to bfloat16 on this machine, and why."""
    found = open_dequant_library()
    return found if isinstance(found, str) else f"{LEVELS[found.moe_dequant_levels()]} dequant"


def open_dequant_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    """The library in `folder`, or the status that says why it cannot be used."""
    return open_library(folder, "dequant", _INTERFACE)
