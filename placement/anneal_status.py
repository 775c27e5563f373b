"""Finds the compiled library of `native/anneal.c`, or the reason why numpy has to do."""

import ctypes
from pathlib import Path

_LIBRARY = "anneal_library.so"  # setup.py builds anneal.c under this name
_INTERFACE = 1  # the number in anneal.c that changes with a signature or a struct

ACTIVE = "compiled"
NOT_BUILT = "numpy (no compiled library: pip install -e . with a C compiler)"
OTHER_BUILD = "numpy (compiled library is of another version: pip install -e . again)"


def anneal_status() -> str:
    """What swaps experts on this machine, and why."""
    found = open_anneal_library()
    return found if isinstance(found, str) else ACTIVE


def open_anneal_library(folder: Path = Path(__file__).parent / "native") -> ctypes.CDLL | str:
    """The library in `folder`, or the status that says why it cannot be used."""
    path = folder / _LIBRARY
    if not path.is_file():
        return NOT_BUILT
    try:
        library = ctypes.CDLL(str(path))
        interface = library.moe_annealing_interface()
    except (OSError, AttributeError):  # built on another system, or not this library
        return OTHER_BUILD
    return library if interface == _INTERFACE else OTHER_BUILD
