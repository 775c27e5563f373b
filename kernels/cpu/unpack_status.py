"""Finds the compiled library of `unpack.c`, or the reason why torch has to do; needs no torch."""

import ctypes
from pathlib import Path

from moe_runtime.kernels.cpu.library import open_library

_INTERFACE = 2  # the number in unpack.c that changes with a signature or a struct

LEVELS = ("c", "avx2", "avx512")  # by the number that unpack.c gives them
NO_SUPPORT = "torch (the compiled library needs a little-endian CPU)"


def unpack_status() -> str:
    """What unpacks lossless packed weights on this machine, and why."""
    found = open_unpack_library()
    return found if isinstance(found, str) else f"{LEVELS[found.moe_unpack_levels()]} unpack"


def open_unpack_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    """The library in `folder`, or the status that says why it cannot be used."""
    library = open_library(folder, "unpack", _INTERFACE)
    if isinstance(library, str):
        return library
    return library if library.moe_unpack_supported() else NO_SUPPORT
