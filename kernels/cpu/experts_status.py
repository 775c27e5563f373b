"""Finds the compiled library of `experts.c`, or the reason why torch has to do; needs no torch."""

import ctypes
from pathlib import Path

from moe_runtime.kernels.cpu.library import open_library

_INTERFACE = 4  # the number in experts.c that changes with a signature or a struct

# Names of the instructions, best first, as `enum level` numbers them.
LEVELS = {"avx512_bf16": 3, "avx512f": 2, "avx2": 1}
DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # `enum dtype`
NO_INSTRUCTIONS = "torch (CPU has no AVX2 with FMA and F16C)"


def experts_status(dtype: str = "bfloat16") -> str:
    """What computes experts of `dtype` on this machine: a level of instructions, or torch."""
    if dtype not in DTYPES:
        return f"torch (no kernel for {dtype})"
    found = open_experts_library()
    return found if isinstance(found, str) else best_level(found, dtype) or NO_INSTRUCTIONS


def best_level(library: ctypes.CDLL, dtype: str) -> str | None:
    """The first of `LEVELS` that this CPU has for `dtype`."""
    for name, number in LEVELS.items():
        if dtype in DTYPES and library.moe_experts_supports(number, DTYPES[dtype]):
            return name
    return None


def open_experts_library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | str:
    """The library in `folder`, or the status that says why it cannot be used."""
    library = open_library(folder, "experts", _INTERFACE)
    if isinstance(library, str):
        return library
    return library if best_level(library, "float32") is not None else NO_INSTRUCTIONS
