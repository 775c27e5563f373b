"""What must hold before a Triton kernel is launched: a device that can run it, plain arguments."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from triton.runtime.jit import JITFunction

LEAST_CAPABILITY = (8, 0)  # bf16 matrix instructions; the oldest that Triton supports well
FP8_CAPABILITY = (8, 9)  # conversions from float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INDICES = (torch.int32, torch.int64)


class UnsupportedKernelError(ValueError):
    """This device, dtype or shape is none that a kernel computes; the message says which are."""


def is_interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs `kernel`, on CPU tensors, instead of a GPU."""
    return not isinstance(kernel, JITFunction)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Launches within go to the tensor's GPU; Triton takes the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_device(kernel: Any, *, needs_fp8: bool = False, **tensors: torch.Tensor | None) -> None:
    """Raise unless `kernel` can run on the one device that holds all `tensors`."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first_name, first), *others = given.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise UnsupportedKernelError(
                f"{name} is on {tensor.device} and {first_name} on {first.device}: "
                "move both to one device"
            )
    if is_interpreted(kernel):
        return
    if not first.is_cuda:
        raise UnsupportedKernelError(
            f"{first_name} is on {first.device}, and Triton kernels run on CUDA devices: move it "
            "to one, or set TRITON_INTERPRET=1 before Python starts to run them slowly on the CPU"
        )
    least = FP8_CAPABILITY if needs_fp8 else LEAST_CAPABILITY
    found = torch.cuda.get_device_capability(first.device)
    if found < least:
        raise UnsupportedKernelError(
            f"{torch.cuda.get_device_name(first.device)} has compute capability "
            f"{found[0]}.{found[1]}, and {'fp8 weights need' if needs_fp8 else 'the kernels need'} "
            f"{least[0]}.{least[1]} or newer: use "
            + ("weights of another format" if needs_fp8 else "the path through torch")
        )


def check_dtype(name: str, tensor: torch.Tensor, supported: tuple[torch.dtype, ...]) -> None:
    """Raise unless `tensor` has one of the `supported` dtypes."""
    if tensor.dtype not in supported:
        raise UnsupportedKernelError(
            f"{name} is {tensor.dtype}; supported: {', '.join(map(str, supported))}"
        )


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise unless `tensor` has the `expected` shape, in which None is any size."""
    fits = tensor.dim() == len(expected) and all(
        size in (None, found) for size, found in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise UnsupportedKernelError(
            f"{name} has shape {tuple(tensor.shape)}; expected: ({wanted})"
        )


def check_power_of_two(name: str, value: int, low: int, high: int) -> None:
    """Raise unless `value` is a power of two from `low` to `high`."""
    if not (low <= value <= high and value & (value - 1) == 0):
        raise UnsupportedKernelError(
            f"{name} ({value}) must be a power of two from {low} to {high}"
        )
