"""The OpenMP runtime that torch computes with, for C kernels: a second one would fight with it."""

import ctypes

import torch

_NAMES = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")


class OpenMP(ctypes.Structure):
    """`struct moe_openmp` of openmp.h: entry points of libgomp."""

    _fields_ = (
        ("parallel", ctypes.c_void_p),
        ("barrier", ctypes.c_void_p),
        ("thread_num", ctypes.c_void_p),
        ("num_threads", ctypes.c_void_p),
    )


def find_openmp() -> OpenMP | None:
    """The runtime behind torch's threads, or None where torch was built with another kind.

    A symbol looked up in torch's extension is found in the libraries that it depends on, as its
    own calls are.
    """
    try:
        library = ctypes.CDLL(torch._C.__file__)
        return OpenMP(*(ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _NAMES))
    except (OSError, AttributeError):
        return None
