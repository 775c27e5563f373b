"""Finds what makes plain experts of stored ones on a device."""

import importlib.util
from collections.abc import Sequence

import torch

from moe_runtime.kernels.scaled_blocks import Dequantizer, TorchDequantizer
from moe_runtime.memory.packed_blob import Unpack

if importlib.util.find_spec("triton") is not None:
    from moe_runtime.kernels.dequant import TritonDequantizer
    from moe_runtime.kernels.launch import FP8_CAPABILITY, LEAST_CAPABILITY, is_interpreted
    from moe_runtime.kernels.product import product_kernel
    from moe_runtime.kernels.unpack import unpack_into


def find_dequantizer(formats: Sequence[str], device: torch.device) -> Dequantizer:
    """Triton's where it knows `formats` on `device`; torch's computes the same more slowly."""
    return TritonDequantizer() if _can_run(device, "fp8" in formats) else TorchDequantizer()


def find_unpack(device: torch.device) -> Unpack | None:
    """What unpacks exponents on `device`, if anything does."""
    return unpack_into if _can_run(device, needs_fp8=False) else None


def _can_run(device: torch.device, needs_fp8: bool) -> bool:
    """Whether Triton's kernels run on `device`; on the CPU its interpreter must be on."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        return is_interpreted(product_kernel)
    least = FP8_CAPABILITY if needs_fp8 else LEAST_CAPABILITY
    return torch.cuda.get_device_capability(device) >= least
