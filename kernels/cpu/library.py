"""Opens a compiled library of this folder, or says why torch has to do; needs no torch."""

import ctypes
from pathlib import Path

NOT_BUILT = "torch (no compiled library: pip install -e . with a C compiler)"
OTHER_BUILD = "torch (compiled library is of another version: pip install -e . again)"


def open_library(folder: Path, name: str, interface: int) -> ctypes.CDLL | str:
    """What setup.py built of `name.c`, or the status that says why it cannot be used.

    `interface` is the number that `moe_<name>_interface` must give: it changes with every
    signature and struct, so that a library of another version is never called.
    """
    path = folder / f"{name}_library.so"
    if not path.is_file():
        return NOT_BUILT
    try:
        library = ctypes.CDLL(str(path))
        found = getattr(library, f"moe_{name}_interface")()
    except (OSError, AttributeError):  # built on another system, or not this library
        return OTHER_BUILD
    return library if found == interface else OTHER_BUILD
