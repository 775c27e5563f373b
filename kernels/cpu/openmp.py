"""The OpenMP runtime behind torch's threads, for C kernels to run on."""

import ctypes

import torch


class OpenMP(ctypes.Structure):
    """`struct moe_openmp`: the entry points of the runtime that torch computes with."""

    _fields_ = (
        ("parallel", ctypes.c_void_p),
        ("thread_num", ctypes.c_void_p),
        ("num_threads", ctypes.c_void_p),
    )


def find_openmp() -> OpenMP | None:
    """The runtime behind torch's threads: a second one would fight with it for the cores.

    A symbol looked up in torch's extension is found in the libraries that it depends on, as its
    own calls are.
    """
    try:
        torch_library = ctypes.CDLL(torch._C.__file__)
        return OpenMP(
            *(
                ctypes.cast(getattr(torch_library, name), ctypes.c_void_p)
                for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
            )
        )
    except (OSError, AttributeError):  # torch was built with another kind of threads
        return None
