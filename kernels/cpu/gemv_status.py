"""Finds the compiled library of `gemv.c`, or the reason why torch has to do; needs no torch."""

import ctypes
from pathlib import Path

from moe_runtime.kernels.cpu.library import open_library

_INTERFACE = 2  # the number in gemv.c that changes with a signature or a struct

ACTIVE = "avx512-bf16 gemv"
NO_INSTRUCTIONS = "torch (CPU has no AVX512-BF16)"


def gemv_status() -> str:
    """What computes one-row bf16 products on this machine, and why."""
    found = open_gemv_library()
    return found if isinstance(found, str) else ACTIVE


def open_gemv_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    """The library in `folder`, or the status that says why it cannot be used."""
    library = open_library(folder, "gemv", _INTERFACE)
    if isinstance(library, str):
        return library
    return library if library.moe_gemv_supported() else NO_INSTRUCTIONS
