"""Random weights in every format, and what they are in float64."""

import functools

import torch

from moe_runtime.kernels.reference import dequantize_reference
from moe_runtime.kernels.slot_weights import SlotWeights, WeightFormat

INT4_GROUP = 32


@functools.cache  # the reference's loops are slow, and nobody changes what it returns
def random_weights(
    weight_format: WeightFormat,
    S: int,
    N: int,
    K: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[SlotWeights, torch.Tensor]:
    """(weights, the same `[S, N, K]` float64) with numbers of the order of 1 / sqrt(K)."""
    generator = torch.Generator().manual_seed(seed)
    if weight_format == "plain":
        values = (torch.randn(S, N, K, generator=generator) * K**-0.5).to(dtype)
        return SlotWeights(values=values), values.double()
    unit = K**-0.5
    if weight_format == "int8":
        values = torch.randint(-128, 128, (S, N, K), generator=generator, dtype=torch.int8)
        scales = (torch.rand(S, N, generator=generator) + 0.5) * (unit / 64)
    elif weight_format == "fp8":
        values = torch.randn(S, N, K, generator=generator).to(torch.float8_e4m3fn)
        scales = (torch.rand(S, -(-N // 128), -(-K // 128), generator=generator) + 0.5) * unit
    else:
        values = torch.randint(0, 256, (S, N, K // 2), generator=generator).to(torch.uint8)
        if weight_format == "int4":
            scales = (torch.rand(S, N, K // INT4_GROUP, generator=generator) + 0.5) * (unit / 4)
        else:
            scales = torch.randint(120, 126, (S, N, K // 32), generator=generator).to(torch.uint8)
    group = INT4_GROUP if weight_format == "int4" else 0
    weights = SlotWeights(values=values, scales=scales, format=weight_format, group=group)
    return weights, dequantize_reference(values, scales, weight_format, group)


def moved(weights: SlotWeights, device: torch.device) -> SlotWeights:
    """The same on `device`, every slot followed by NaN-like bytes, as in a slab of many parts."""
    return SlotWeights(
        values=in_slab(weights.values, device),
        scales=None if weights.scales is None else in_slab(weights.scales, device),
        bias=None if weights.bias is None else in_slab(weights.bias, device),
        format=weights.format,
        group=weights.group,
    )


def in_slab(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A view `[S, ...]` into bytes whose slots are longer than this tensor's part of them."""
    size = tensor[0].numel() * tensor.element_size()
    begin, stride = 64, 64 + size + 192
    stride += -stride % 64
    slab = torch.full((tensor.shape[0], stride), 0xFF, dtype=torch.uint8)
    part = slab[:, begin : begin + size].view(tensor.dtype)
    # Rows of bytes of the same length, so that the view is strided and nothing is copied.
    part.copy_(tensor.reshape(tensor.shape[0], -1))
    view = torch.as_strided(
        slab.to(device).view(-1).view(tensor.dtype),
        tensor.shape,
        (stride // tensor.element_size(), *tensor[0].contiguous().stride()),
        begin // tensor.element_size(),
    )
    assert view.data_ptr() % 64 == 0 or view.device.type == "cpu"
    return view


@functools.cache
def weights_in_parts(
    weight_format: WeightFormat, S: int, rows: int, K: int
) -> tuple[SlotWeights, torch.Tensor]:
    """Two parts of so many rows each, scaled by themselves, and the same `[S, 2 * rows, K]`."""
    weights, dense = random_weights(weight_format, 2 * S, rows, K, seed=4)
    scales = weights.scales
    parts = SlotWeights(
        values=weights.values.unflatten(0, (S, 2)),
        scales=None if scales is None else scales.unflatten(0, (S, 2)),
        format=weights.format,
        group=weights.group,
    )
    return parts, dense.view(S, 2 * rows, K)


def apart(weights: SlotWeights, device: torch.device) -> SlotWeights:
    """`moved`, with bytes that are NaN also between the two parts of a slot."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        parts = in_slab(tensor.flatten(0, 1), device)
        return parts.unflatten(0, (-1, 2))

    return SlotWeights(
        values=place(weights.values),
        scales=None if weights.scales is None else place(weights.scales),
        format=weights.format,
        group=weights.group,
    )
