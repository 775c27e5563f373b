"""Finds the compiled library of `gemv.c`, or the reason why torch has to do; needs no torch."""

import ctypes
from pathlib import Path

_LIBRARY = "gemv_library.so"  # setup.py builds gemv.c under this name
_INTERFACE = 2  # the number in gemv.c that changes with a signature or a struct

ACTIVE = "avx512-bf16 gemv"
NOT_BUILT = "torch (no compiled library: pip install -e . with a C compiler)"
OTHER_BUILD = "torch (compiled library is of another version: pip install -e . again)"
NO_INSTRUCTIONS = "torch (CPU has no AVX512-BF16)"


def gemv_status() -> str:
    """What computes one-row bf16 products on this machine, and why."""
    found = open_gemv_library()
    return found if isinstance(found, str) else ACTIVE


def open_gemv_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    """The library in `folder`, or the status that says why it cannot be used."""
    path = folder / _LIBRARY
    if not path.is_file():
        return NOT_BUILT
    try:
        library = ctypes.CDLL(str(path))
        interface = library.moe_gemv_interface()
    except (OSError, AttributeError):  # built on another system, or not this library
        return OTHER_BUILD
    if interface != _INTERFACE:
        return OTHER_BUILD
    return library if library.moe_gemv_supported() else NO_INSTRUCTIONS
