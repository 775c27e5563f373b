"""Finds the compiled library of `unpack.c`, or the reason why torch has to do; needs no torch."""

import ctypes
from pathlib import Path

_LIBRARY = "unpack_library.so"  # setup.py builds unpack.c under this name
_INTERFACE = 2  # the number in unpack.c that changes with a signature or a struct

LEVELS = ("c", "avx2", "avx512")  # by the number that unpack.c gives them
NOT_BUILT = "torch (no compiled library: pip install -e . with a C compiler)"
OTHER_BUILD = "torch (compiled library is of another version: pip install -e . again)"
NO_SUPPORT = "torch (the compiled library needs a little-endian CPU)"


def unpack_status() -> str:
    """What unpacks lossless packed weights on this machine, and why."""
    found = open_unpack_library()
    return found if isinstance(found, str) else f"{LEVELS[found.moe_unpack_levels()]} unpack"


def open_unpack_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    """The library in `folder`, or the status that says why it cannot be used."""
    path = folder / _LIBRARY
    if not path.is_file():
        return NOT_BUILT
    try:
        library = ctypes.CDLL(str(path))
        interface = library.moe_unpack_interface()
    except (OSError, AttributeError):  # built on another system, or not this library
        return OTHER_BUILD
    if interface != _INTERFACE:
        return OTHER_BUILD
    return library if library.moe_unpack_supported() else NO_SUPPORT
